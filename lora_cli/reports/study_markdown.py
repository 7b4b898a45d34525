"""The report of a study as Markdown, in short: for a README."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lora_cli.columns import Column, markdown_table, markdown_text
from lora_cli.reports.study_facts import CONTROLS, StudyReport, Verdict
from lora_cli.reports.study_tables import AGAINST, COSTS, GAINS, SCORES, gain_rows, score_rows, undone_in_words
from lora_cli.text import counted, shortened

_MOST_NAMED = 10
IN_SHORT = ("system", "pool", "gain", "p_holm", "shown", "needed")
"""The columns of gains that Markdown shows."""


def study_markdown(report: StudyReport) -> str:
    """Verdict, scores, gains, costs and cells without a result."""
    parts = verdict_lines(report.verdict)
    if warning := undone_in_words(report):
        parts.append(f"\n{warning}")
    metric = f"{report.meaning.rstrip('.')}, {report.better} is better"
    parts.append(f"\n{metric}; {counted(report.n, 'test example')}; means over seeds with 95 % intervals.")
    parts.append(table_lines(SCORES, score_rows(report)))
    short = [column for column in GAINS if column.key in IN_SHORT]
    for control in CONTROLS:
        if rows := gain_rows(report, control):
            parts.append(
                f"{AGAINST[control]}, paired, positive where the system is better:\n{table_lines(short, rows)}"
            )
    parts.append(f"What one cell took in the mean, with its shared work:\n{table_lines(COSTS, score_rows(report))}")
    parts.append(f"Base: {markdown_text(report.about.get('Base', ''))}. {_licences(report)}")
    parts += undone_lines(report.failed, report.missing)
    return "\n".join(parts) + "\n"


def verdict_lines(verdict: Verdict) -> list[str]:
    """A verdict and its answers."""
    answers = [f"- {one.question} {markdown_text(one.found)} {one.follows}" for one in verdict.answers]
    return [f"**{verdict.summary}**", *answers]


def undone_lines(failed: Mapping[str, str], missing: Sequence[str]) -> list[str]:
    """The cells without a result."""
    return [*_undone("Failed", [f"{name}: {error}" for name, error in failed.items()]), *_undone("Not tried", missing)]


def table_lines(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> str:
    """A table below an empty line."""
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
