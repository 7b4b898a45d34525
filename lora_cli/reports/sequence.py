"""The page of `lora study report` on a sequence: verdict, scores, a[i][j], order of the rules, gains, sources."""

from lora_cli.reports.heat import tiles
from lora_cli.reports.page import Html, element, joined, page, shown
from lora_cli.reports.parts import (
    cost_section,
    facts_table,
    faint,
    scores_section,
    scroll,
    table,
    undone_section,
    verdict_section,
)
from lora_cli.reports.sequence_tables import (
    LORAS,
    MEASURES,
    ORDER,
    RULES,
    TASKS,
    lora_rows,
    order_rows,
    rule_rows,
    task_rows,
    without_pool,
)
from lora_cli.reports.study_facts import Control, SequenceReport
from lora_cli.reports.study_tables import AGAINST, COSTS, GAINS, SCORES, gain_rows, score_rows, undone_in_words
from lora_cli.text import counted

SHOWN_CONTROLS: tuple[Control, ...] = ("base", "sequential", "alone")
_TITLE = "Does merging keep what was learnt?"
_SCORED = (
    "After the last task, in the mean over tasks and seeds, with the 95 % interval over the test examples. alone is "
    "the LoRA of each task on its own task."
)
_MEASURED = (
    "Means over seeds, and the range of single seeds. Forgetting is positive where something was lost, transfer where "
    "something was won."
)
_ORDERED = (
    "From the best to the worst final score. Where two neighbours are not separable, their order may be chance. Holm's "
    "correction counts all neighbours."
)
_COMPARED = (
    "Paired on the same test examples, positive where the rule is better, every task counting the same, with the "
    "paired bootstrap's 95 % interval. Holm's correction counts all comparisons of a table."
)
_TOOK = (
    "What all cells of a rule took by one seed, with the LoRAs that it merges, scored on every task after each task."
)


def sequence_page(report: SequenceReport) -> bytes:
    """The page of a sequence, as one HTML file."""
    best = f"{report.meaning.rstrip('.')}, {report.better} is better"
    done = f"{report.done:,} of {counted(report.planned, 'cell')} done."
    about = f"{best}. {counted(len(report.tasks), 'task')}, {counted(report.n, 'test example')}, {done}"
    body = joined(
        element("header", element("h1", _TITLE), faint(shown(report.about.get("Base", ""))), faint(about)),
        element(
            "main",
            verdict_section(report.verdict, undone_in_words(report)),
            scores_section(
                report.rows,
                _SCORED,
                table(without_pool(SCORES), score_rows(report), "Scores"),
                element("h3", "Measures of continual learning"),
                faint(_MEASURED),
                table(MEASURES, rule_rows(report), "Measures of continual learning"),
            ),
            _maps(report),
            _order(report),
            _gains(report),
            cost_section(report.rows, _TOOK, without_pool(COSTS), score_rows(report)),
            undone_section(report.failed, report.missing),
            _sources(report),
            class_="study",
        ),
    )
    return page(_TITLE, body)


def _maps(report: SequenceReport) -> Html:
    """a[i][j] of every rule, on one scale."""
    most = max((abs(number) for one in report.rules for row in one.a for number in row), default=0.0)
    names = [one.name for one in report.tasks]
    told = (
        f"A row is the running LoRA after a task, a column the score on a task: {report.better} is better. Means over "
        "seeds; all maps have one scale, the fuller the larger."
    )
    maps = []
    for one in report.rules:
        drawn = tiles(
            f"Scores of {shown(one.rule)}", [f"after {name}" for name in names], names, [*map(list, one.a)], most=most
        )
        maps += [element("h3", shown(one.rule)), scroll(drawn, f"Scores of {shown(one.rule)}")]
    return element("section", element("h2", "Scores after each task"), faint(told), *maps, class_="tiles")


def _order(report: SequenceReport) -> Html:
    return element(
        "section",
        element("h2", "Order of the rules"),
        faint(_ORDERED),
        table(ORDER, order_rows(report), "Order of the rules"),
        element("h3", "What each rule does"),
        faint("At each task, in this order: the running LoRA, then the one that was trained on the task alone."),
        table(RULES, rule_rows(report), "What each rule does"),
    )


def _gains(report: SequenceReport) -> Html:
    tables = []
    for control in SHOWN_CONTROLS:
        if rows := gain_rows(report, control):
            tables += [element("h3", AGAINST[control]), table(without_pool(GAINS), rows, AGAINST[control])]
    return element("section", element("h2", "Gains"), faint(_COMPARED), *tables)


def _sources(report: SequenceReport) -> Html:
    return element(
        "section",
        element("h2", "Where it comes from"),
        facts_table(report.about),
        element("h3", "Tasks, in their order"),
        table(TASKS, task_rows(report), "Tasks"),
        element("h3", "LoRAs"),
        table(LORAS, lora_rows(report), "LoRAs"),
    )
