"""The page of `lora study report`: verdict, scores, gains, costs, coefficients, answers, and where all comes from."""

from collections.abc import Sequence

from lora_cli.names import unpinned
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
from lora_cli.reports.study_facts import CONTROLS, Change, Changes, Learnt, StudyReport
from lora_cli.reports.study_tables import (
    ADAPTERS,
    AGAINST,
    COSTS,
    GAINS,
    SCORES,
    adapter_rows,
    gain_rows,
    score_rows,
    undone_in_words,
)
from lora_cli.text import counted

_TITLE = "Is recycling LoRAs worth it?"
_SCORED = "Means over seeds, with the 95 % interval over the test examples."
_TOOK = (
    "What one cell took in the mean: to select, learn, make and score, with all of its shared work, as if it were "
    "alone. Tokens are those read to learn and written to answer."
)
_HALF, _LONGEST = 150, 300
"""The characters that are left of either end of a long prompt, and of the beginning of a long answer."""


def study_page(report: StudyReport) -> bytes:
    """The page of a study, as one HTML file."""
    best = f"{report.meaning.rstrip('.')}, {report.better} is better"
    about = f"{best}. {counted(report.n, 'test example')}, {report.done:,} of {counted(report.planned, 'cell')} done."
    body = joined(
        element("header", element("h1", _TITLE), faint(shown(report.about.get("Base", ""))), faint(about)),
        element(
            "main",
            verdict_section(report.verdict, undone_in_words(report)),
            scores_section(report.rows, _SCORED, table(SCORES, score_rows(report), "Scores")),
            _gains(report),
            cost_section(report.rows, _TOOK, COSTS, score_rows(report)),
            *([_learnt(report.learnt)] if report.learnt else []),
            *([_changes(report.changes)] if report.changes else []),
            undone_section(report.failed, report.missing),
            _sources(report),
            class_="study",
        ),
    )
    return page(_TITLE, body)


def _gains(report: StudyReport) -> Html:
    told = (
        "Paired on the same test examples, positive where the system is better, with the paired bootstrap's 95 % "
        "interval. Holm's correction counts all comparisons of a table. Examples to show it: with so many, 80 % of "
        "studies that compare nothing else show a difference as large as the one seen, two-sided at 5 %."
    )
    tables = []
    for control in CONTROLS:
        if rows := gain_rows(report, control):
            tables += [element("h3", AGAINST[control]), table(GAINS, rows, AGAINST[control])]
    return element("section", element("h2", "Gains"), faint(told), *tables)


def _learnt(found: Sequence[Learnt]) -> Html:
    told = joined(
        element("span", _square("positive"), " positive "),
        element("span", _square("negative"), " negative"),
        ", the fuller the larger; each map has its own scale.",
        " A coefficient per rank is shown as the mean over the ranks." if any(one.by_rank for one in found) else "",
    )
    maps = [joined(element("h3", shown(one.cell)), faint(_extent(one)), _tiles(one)) for one in found]
    return element("section", element("h2", "Coefficients"), faint(told), *maps, class_="tiles")


def _extent(one: Learnt) -> str:
    numbers = [number for line in one.values for number in line if number is not None]
    size = f"{counted(len(one.adapters), 'adapter')} × {counted(len(one.modules), 'module')}"
    return f"{size}, from {min(numbers):.3f} to {max(numbers):.3f}" if numbers else size


def _tiles(one: Learnt) -> Html:
    adapters = [unpinned(pinned).rpartition("/")[2] for pinned in one.adapters]
    drawn = tiles(f"Coefficients of {shown(one.cell)}", adapters, _without_common(one.modules), one.values)
    return element("div", drawn, class_="scroll", tabindex=0, role="region", aria_label="Coefficients")


def _without_common(names: Sequence[str]) -> list[str]:
    """The names without the beginning, up to a dot, that all of them share."""
    parts = [name.split(".") for name in names]
    shared = 0
    while len(names) > 1 and all(len(one) > shared + 1 and one[shared] == parts[0][shared] for one in parts):
        shared += 1
    return [".".join(one[shared:]) for one in parts]


def _square(name: str) -> Html:
    return element("svg", element("rect", width=1, height=1, class_=name), viewBox="0 0 1 1", class_="key")


def _changes(found: Changes) -> Html:
    told = (
        f"Of {found.name} in the cell {found.cell}, beside the base: better on {found.gained:,}, worse on "
        f"{found.lost:,}, alike on {counted(found.same, 'test example')}. The largest changes of either kind:"
    )
    heads = ["Example", "Prompt", "Expected", "Base", "System", "Change"]
    head = element("tr", *(element("th", one, scope="col") for one in heads))
    rows = [*(_change(one, "better") for one in found.gains), *(_change(one, "worse") for one in found.losses)]
    answers = element("table", element("thead", head), element("tbody", *rows))
    return element(
        "section", element("h2", "What changed in the answers"), faint(shown(told)), scroll(answers, "Answers")
    )


def _change(one: Change, kind: str) -> Html:
    return element(
        "tr",
        element("td", shown(one.id)),
        element("td", _lines(_ends(one.prompt)), class_="text"),
        element("td", _lines(_beginning(one.expected))),
        element("td", _answer(one.base, one.base_value)),
        element("td", _answer(one.system, one.system_value)),
        element("td", kind),
    )


def _answer(text: str | None, value: float) -> Html:
    """An answer, or its value where nothing was generated."""
    return joined(f"{value:.3f}") if text is None else _lines(_beginning(text))


def _ends(text: str) -> str:
    return text if len(text) <= 2 * _HALF else f"{text[:_HALF]} … {text[-_HALF:]}"


def _beginning(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _lines(text: str) -> Html:
    """A text of several lines."""
    first, *rest = text.split("\n")
    return joined(first, *(joined(Html("<br>"), line) for line in rest))


def _sources(report: StudyReport) -> Html:
    """Where the results come from."""
    rows = adapter_rows(report.adapters)
    used = [faint(f"{counted(len(rows), 'adapter')} in the cells that are done."), table(ADAPTERS, rows, "Adapters")]
    return element(
        "section",
        element("h2", "Where it comes from"),
        facts_table(report.about),
        *([element("h3", "Adapters"), *used] if rows else []),
    )
