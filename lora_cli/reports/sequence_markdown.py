"""The report of a sequence as Markdown, in short: for a README."""

from lora_cli.columns import Column, markdown_text
from lora_cli.reports.sequence import SHOWN_CONTROLS
from lora_cli.reports.sequence_tables import MEASURES, ORDER, order_rows, rule_rows, without_pool
from lora_cli.reports.study_facts import SequenceReport
from lora_cli.reports.study_markdown import IN_SHORT, table_lines, undone_lines, verdict_lines
from lora_cli.reports.study_tables import AGAINST, COSTS, GAINS, SCORES, gain_rows, score_rows, undone_in_words
from lora_cli.text import counted


def sequence_markdown(report: SequenceReport) -> str:
    """Verdict, scores, measures, a[i][j], order of the rules, gains, costs and cells without a result."""
    parts = verdict_lines(report.verdict)
    if warning := undone_in_words(report):
        parts.append(f"\n{warning}")
    metric = f"{report.meaning.rstrip('.')}, {report.better} is better"
    names = ", then ".join(markdown_text(one.name) for one in report.tasks)
    parts.append(f"\n{metric}; {counted(report.n, 'test example')} of {names}; means over seeds, with 95 % intervals.")
    parts.append(table_lines(without_pool(SCORES), score_rows(report)))
    parts.append(f"Means over seeds, and the range of single seeds:\n{table_lines(MEASURES, rule_rows(report))}")
    parts.append(f"Rules from the best to the worst:\n{table_lines(ORDER, order_rows(report))}")
    tasks = [*enumerate(report.tasks)]
    columns = [Column("After", "after"), *(Column(markdown_text(task.name), str(j), "right") for j, task in tasks)]
    for one in report.rules:
        rows = [
            {"after": task.name} | {str(j): f"{score:.3f}" for j, score in enumerate(one.a[i])} for i, task in tasks
        ]
        parts.append(f"Scores of {markdown_text(one.rule)} on each task:\n{table_lines(columns, rows)}")
    short = [column for column in without_pool(GAINS) if column.key in IN_SHORT]
    for control in SHOWN_CONTROLS:
        if found := gain_rows(report, control):
            parts.append(f"{AGAINST[control]}, paired, positive where the rule is better:\n{table_lines(short, found)}")
    parts.append(f"What a rule took by one seed:\n{table_lines(without_pool(COSTS), score_rows(report))}")
    parts.append(f"Base: {markdown_text(report.about.get('Base', ''))}.")
    parts += undone_lines(report.failed, report.missing)
    return "\n".join(parts) + "\n"
