"""The report of a study as Markdown, in short: for a README."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lora_cli.columns import Column, markdown_table, markdown_text
from lora_cli.reports.study_facts import CONTROLS, StudyReport
from lora_cli.reports.study_tables import AGAINST, COSTS, GAINS, SCORES, gain_rows, score_rows, undone_in_words
from lora_cli.text import counted, shortened

_MOST_NAMED = 10
_SHORT = ("system", "pool", "gain", "p_holm", "shown", "needed")


def study_markdown(report: StudyReport) -> str:
    """Verdict, scores, gains, costs and cells without a result."""
    parts = [f"**{report.verdict.summary}**"]
    parts += [f"- {one.question} {markdown_text(one.found)} {one.follows}" for one in report.verdict.answers]
    if warning := undone_in_words(report):
        parts.append(f"\n{warning}")
    metric = f"{report.meaning.rstrip('.')}, {report.better} is better"
    parts.append(f"\n{metric}; {counted(report.n, 'test example')}; means over seeds with 95 % intervals.")
    parts.append(_table(SCORES, score_rows(report)))
    short = [column for column in GAINS if column.key in _SHORT]
    for control in CONTROLS:
        if rows := gain_rows(report, control):
            parts.append(f"{AGAINST[control]}, paired, positive where the system is better:\n{_table(short, rows)}")
    parts.append(f"What one cell took in the mean, with its shared work:\n{_table(COSTS, score_rows(report))}")
    parts.append(f"Base: {markdown_text(report.about.get('Base', ''))}. {_licences(report)}")
    parts += _undone("Failed", [f"{name}: {error}" for name, error in report.failed.items()])
    parts += _undone("Not tried", report.missing)
    return "\n".join(parts) + "\n"


def _table(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> str:
    return f"\n{markdown_table(columns, rows)}"


def _licences(report: StudyReport) -> str:
    """How many adapters there are, by licence."""
    counts = Counter(one.licence or "no licence stated" for one in report.adapters)
    told = ", ".join(f"{number:,} {markdown_text(shortened(licence))}" for licence, number in sorted(counts.items()))
    return f"{counted(len(report.adapters), 'adapter')}{f': {told}' if told else ''}."


def _undone(title: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    more = f", and {len(names) - _MOST_NAMED:,} more" if len(names) > _MOST_NAMED else ""
    return [f"\n{title}: {', '.join(markdown_text(shortened(name)) for name in names[:_MOST_NAMED])}{more}."]
