"""The page of `lora study report`: verdict, scores, gains, costs, coefficients, answers, and where all comes from."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lora_cli.columns import Column
from lora_cli.escapes import safe
from lora_cli.names import unpinned
from lora_cli.reports.heat import tiles
from lora_cli.reports.marks import Mark, cost_chart, intervals_chart
from lora_cli.reports.page import Html, element, joined, page, shown
from lora_cli.reports.study_facts import CONTROLS, Change, Changes, Learnt, Row, StudyReport, Verdict
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
_NOTHING = "–"
_HALF, _LONGEST = 150, 300
"""The characters that are left of either end of a long prompt, and of the beginning of a long answer."""
_MINUTES = 120.0
"""The seconds from which costs are shown in minutes."""
_LONG = ("id", "cells")
"""The columns whose texts are broken anywhere."""
_MOST_NAMED = 50
"""The cells without a result that are named."""


def study_page(report: StudyReport) -> bytes:
    """The page of a study, as one HTML file."""
    best = f"{report.meaning.rstrip('.')}, {report.better} is better"
    about = f"{best}. {counted(report.n, 'test example')}, {report.done:,} of {counted(report.planned, 'cell')} done."
    body = joined(
        element("header", element("h1", _TITLE), _faint(shown(report.about.get("Base", ""))), _faint(about)),
        element(
            "main",
            _verdict(report.verdict, undone_in_words(report)),
            _scores(report),
            _gains(report),
            _cost(report),
            *([_learnt(report.learnt)] if report.learnt else []),
            *([_changes(report.changes)] if report.changes else []),
            _undone(report),
            _sources(report),
            class_="study",
        ),
    )
    return page(_TITLE, body)


def _faint(*text: object) -> Html:
    return element("p", *text, class_="faint")


def _verdict(verdict: Verdict, warning: str) -> Html:
    answers = [
        joined(
            element("dt", one.question),
            element("dd", one.found),
            element("dd", one.follows),
        )
        for one in verdict.answers
    ]
    warnings = [element("p", warning)] if warning else []
    return element("section", element("h2", verdict.summary), *warnings, element("dl", *answers), class_="verdict")


def _scores(report: StudyReport) -> Html:
    base = next((row.value for row in report.rows if row.role == "base"), None)
    reference = "" if base is None else " The dashed line is the base."
    told = f"Means over seeds, with the 95 % interval over the test examples.{reference} Controls are grey."
    return element(
        "section",
        element("h2", "Scores"),
        _faint(told),
        intervals_chart([_mark(row) for row in report.rows], base),
        _table(SCORES, score_rows(report), "Scores"),
    )


def _mark(row: Row) -> Mark:
    return Mark(row.name, row.value, row.low, row.high, row.role != "recycled", row.seconds)


def _gains(report: StudyReport) -> Html:
    told = (
        "Paired on the same test examples, positive where the system is better, with the paired bootstrap's 95 % "
        "interval. Holm's correction counts all comparisons of a table. Examples to show it: with so many, 80 % of "
        "studies that compare nothing else show a difference as large as the one seen, two-sided at 5 %."
    )
    tables = []
    for control in CONTROLS:
        if rows := gain_rows(report, control):
            tables += [element("h3", AGAINST[control]), _table(GAINS, rows, AGAINST[control])]
    return element("section", element("h2", "Gains"), _faint(told), *tables)


def _cost(report: StudyReport) -> Html:
    told = (
        "What one cell took in the mean: to select, learn, make and score, with all of its shared work, as if it were "
        "alone. Tokens are those read to learn and written to answer. Where names would overlap, pointing at a dot "
        "shows its name."
    )
    known = [_mark(row) for row in report.rows if row.seconds is not None]
    unit, name = (60.0, "minutes") if any((mark.cost or 0.0) >= _MINUTES for mark in known) else (1.0, "seconds")
    marks = [mark._replace(cost=(mark.cost or 0.0) / unit) for mark in known]
    chart = [cost_chart(f"Score by {name}", marks, name)] if marks else []
    table = _table(COSTS, score_rows(report), "Costs")
    return element("section", element("h2", "Cost"), _faint(told), *chart, table, class_="cost")


def _learnt(found: Sequence[Learnt]) -> Html:
    told = joined(
        element("span", _square("positive"), " positive "),
        element("span", _square("negative"), " negative"),
        ", the fuller the larger; each map has its own scale.",
        " A coefficient per rank is shown as the mean over the ranks." if any(one.by_rank for one in found) else "",
    )
    maps = [joined(element("h3", shown(one.cell)), _faint(_extent(one)), _tiles(one)) for one in found]
    return element("section", element("h2", "Coefficients"), _faint(told), *maps, class_="tiles")


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
    table = element("table", element("thead", head), element("tbody", *rows))
    return element(
        "section", element("h2", "What changed in the answers"), _faint(shown(told)), _scroll(table, "Answers")
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


def _undone(report: StudyReport) -> Html:
    """The cells without a result."""
    failed = [f"{name}: {error}" for name, error in report.failed.items()]
    parts = [*_named("Cells that failed", failed), *_named("Cells that nobody has tried", report.missing)]
    return element("section", element("h2", "Cells without a result"), *parts) if parts else Html("")


def _named(title: str, names: Sequence[str]) -> list[Html]:
    if not names:
        return []
    more = [element("li", f"and {len(names) - _MOST_NAMED:,} more")] if len(names) > _MOST_NAMED else []
    items = [element("li", shown(name)) for name in names[:_MOST_NAMED]]
    return [element("h3", title), element("ul", *items, *more)]


def _sources(report: StudyReport) -> Html:
    """Where the results come from."""
    facts = [
        element("tr", element("th", name, scope="row"), element("td", element("code", safe(value))))
        for name, value in report.about.items()
    ]
    rows = adapter_rows(report.adapters)
    used = [_faint(f"{counted(len(rows), 'adapter')} in the cells that are done."), _table(ADAPTERS, rows, "Adapters")]
    return element(
        "section",
        element("h2", "Where it comes from"),
        element("table", element("tbody", *facts), class_="facts"),
        *([element("h3", "Adapters"), *used] if rows else []),
    )


def _table(columns: Sequence[Column], rows: Iterable[Mapping[str, Any]], title: str) -> Html:
    head = element("tr", *(element("th", one.heading, scope="col", **_class(one)) for one in columns))
    body = [element("tr", *(element("td", _cell(one, row), **_class(one)) for one in columns)) for row in rows]
    return _scroll(element("table", element("thead", head), element("tbody", *body)), title)


def _cell(column: Column, row: Mapping[str, Any]) -> str:
    """A cell. An adapter's id and commit are never cut: they are there to be copied."""
    value = column.shown(row)
    if isinstance(value, list):
        return element("details", element("summary", f"{len(value):,}"), ", ".join(map(shown, value)))
    if value is None or value == "":
        return _NOTHING
    return safe(value) if column.key in ("id", "commit") else shown(str(value))


def _class(column: Column) -> dict[str, str]:
    return {"class_": "number" if column.align == "right" else "long" if column.key in _LONG else "word"}


def _scroll(table: Html, title: str) -> Html:
    return element("div", table, class_="scroll", tabindex=0, role="region", aria_label=title)
