"""Parts that the pages of studies share: verdict, tables, charts of scores and costs, and cells without a result."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lora_cli.columns import Column
from lora_cli.escapes import safe
from lora_cli.reports.marks import Mark, cost_chart, intervals_chart
from lora_cli.reports.page import Html, element, joined, shown
from lora_cli.reports.study_facts import Row, Verdict

_NOTHING = "–"
_MINUTES = 120.0
"""The seconds from which costs are shown in minutes."""
_LONG = ("id", "cells", "train", "test", "sha256")
"""The columns whose texts are broken anywhere."""
_WHOLE = ("id", "commit", *_LONG[2:])
"""The columns whose texts are never cut: they are there to be copied."""
_MOST_NAMED = 50
"""The cells without a result that are named."""


def faint(*text: object) -> Html:
    """A paragraph beside what matters."""
    return element("p", *text, class_="faint")


def verdict_section(verdict: Verdict, warning: str) -> Html:
    """A verdict with its answers, below a warning that is not empty."""
    answers = [
        joined(element("dt", one.question), element("dd", one.found), element("dd", one.follows))
        for one in verdict.answers
    ]
    warnings = [element("p", warning)] if warning else []
    return element("section", element("h2", verdict.summary), *warnings, element("dl", *answers), class_="verdict")


def scores_section(rows: Sequence[Row], told: str, *tables: Html) -> Html:
    """Scores with their intervals, and tables of them."""
    base = next((row.value for row in rows if row.role == "base"), None)
    reference = "" if base is None else " The dashed line is the base."
    chart = intervals_chart([_mark(row) for row in rows], base)
    return element("section", element("h2", "Scores"), faint(f"{told}{reference} Controls are grey."), chart, *tables)


def cost_section(
    rows: Sequence[Row], told: str, columns: Sequence[Column], records: Iterable[Mapping[str, Any]]
) -> Html:
    """Scores by what they cost, and a table of `records`, one for each row."""
    known = [_mark(row) for row in rows if row.seconds is not None]
    unit, name = (60.0, "minutes") if any((mark.cost or 0.0) >= _MINUTES for mark in known) else (1.0, "seconds")
    marks = [mark._replace(cost=(mark.cost or 0.0) / unit) for mark in known]
    chart = [cost_chart(f"Score by {name}", marks, name)] if marks else []
    overlap = "Where names would overlap, pointing at a dot shows its name."
    costs = table(columns, records, "Costs")
    return element("section", element("h2", "Cost"), faint(f"{told} {overlap}"), *chart, costs, class_="cost")


def _mark(row: Row) -> Mark:
    return Mark(row.name, row.value, row.low, row.high, not row.is_asked, row.seconds)


def undone_section(failed: Mapping[str, str], missing: Sequence[str]) -> Html:
    """The cells without a result."""
    errors = [f"{name}: {error}" for name, error in failed.items()]
    parts = [*_named("Cells that failed", errors), *_named("Cells that nobody has tried", missing)]
    return element("section", element("h2", "Cells without a result"), *parts) if parts else Html("")


def _named(title: str, names: Sequence[str]) -> list[Html]:
    if not names:
        return []
    more = [element("li", f"and {len(names) - _MOST_NAMED:,} more")] if len(names) > _MOST_NAMED else []
    items = [element("li", shown(name)) for name in names[:_MOST_NAMED]]
    return [element("h3", title), element("ul", *items, *more)]


def facts_table(facts: Mapping[str, str]) -> Html:
    """Facts by their names."""
    rows = [
        element("tr", element("th", name, scope="row"), element("td", element("code", safe(value))))
        for name, value in facts.items()
    ]
    return element("table", element("tbody", *rows), class_="facts")


def table(columns: Sequence[Column], rows: Iterable[Mapping[str, Any]], title: str) -> Html:
    """A table that scrolls by itself where it is wide."""
    head = element("tr", *(element("th", one.heading, scope="col", **_class(one)) for one in columns))
    body = [element("tr", *(element("td", _cell(one, row), **_class(one)) for one in columns)) for row in rows]
    return scroll(element("table", element("thead", head), element("tbody", *body)), title)


def _cell(column: Column, row: Mapping[str, Any]) -> str:
    value = column.shown(row)
    if isinstance(value, list):
        return element("details", element("summary", f"{len(value):,}"), ", ".join(map(shown, value)))
    if value is None or value == "":
        return _NOTHING
    return safe(value) if column.key in _WHOLE else shown(str(value))


def _class(column: Column) -> dict[str, str]:
    return {"class_": "number" if column.align == "right" else "long" if column.key in _LONG else "word"}


def scroll(inside: Html, title: str) -> Html:
    """What may be wider than the page."""
    return element("div", inside, class_="scroll", tabindex=0, role="region", aria_label=title)
