"""The report of a pool: totals, numbers of adapters with bars, and a table of all adapters."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from lora_cli.escapes import safe
from lora_cli.records import PoolMap, PoolReport, ReportedAdapter, Share
from lora_cli.reports.page import Html, element, joined, page, shown
from lora_cli.text import counted, size

_PART = 50
"""The rows that the table shows at a time; without scripts the first of them."""
_NOTHING = "–"
_WIDE, _HIGH, _EDGE = 900.0, 500.0, 20.0
_SMALLEST, _LARGEST, _INK = 3.0, 8.0, 60.0
"""Units of the map: width, height and the room around it; the radius of a point, and √n times that of one of n."""
_MOST_NAMED, _LINE, _LETTER = 30, 13.0, 7.0
"""The points of a map that shows names, and the height and width that a letter of a name takes at most."""
_LEAST = 1e-6
_SHORT = 24
"""The characters of a label that has room beside its bar."""


class _Column(NamedTuple):
    """A column of the table. `kind` is text, number or size; `choice` offers its values as a filter."""

    title: str
    field: str
    kind: str = "text"
    choice: bool = False


_COLUMNS = (
    _Column("Adapter", "id"),
    _Column("Author", "author"),
    _Column("Base", "base", choice=True),
    _Column("Rank", "rank", "number"),
    _Column("Modules", "modules", "number"),
    _Column("Size", "bytes", "size"),
    _Column("Licence", "licence", choice=True),
    _Column("Downloads", "downloads", "number"),
    _Column("Created", "created_at"),
    _Column("Status", "status", choice=True),
    _Column("Reason", "reason"),
)


def pool_page(report: PoolReport) -> bytes:
    """The page of a pool, as one HTML file."""
    body = joined(
        element("header", element("h1", "Pool of LoRA adapters"), *map(_faint, _about(report))),
        element("main", _totals(report), _counts(report), _map(report.map), _table(report.adapters)),
    )
    return page("Pool of LoRA adapters", body, {"part": _PART, "columns": _data(report.adapters)})


def _about(report: PoolReport) -> list[str]:
    where = [f"Only adapters with {' and '.join(map(shown, report.conditions))}."] if report.conditions else []
    synced = f"Last sync {report.last_sync[:16].replace('T', ' ')} UTC." if report.last_sync else "Never synced."
    return [*where, synced]


def _faint(*text: object) -> Html:
    return element("p", *text, class_="faint")


def _totals(report: PoolReport) -> Html:
    quarantined = sum(one.status == "quarantined" for one in report.adapters)
    other = report.total.adapters - report.total.usable - quarantined
    figures = {
        "adapters": f"{report.total.adapters:,}",
        "usable": f"{report.total.usable:,}",
        "quarantined": f"{quarantined:,}",
        "not usable": f"{other:,}",
        "known authors": f"{report.authors:,}",
        "weights": size(report.bytes),
    }
    tiles = [element("div", element("dt", name), element("dd", figure)) for name, figure in figures.items()]
    return element("dl", *tiles, class_="totals")


def _counts(report: PoolReport) -> Html:
    key = _faint(_square("usable"), " usable (status ok) ", _square("other"), " any other status")
    return joined(key, element("div", *(_count(*one) for one in report.counts.items() if one[1]), class_="counts"))


def _count(title: str, shares: Sequence[Share]) -> Html:
    most = max((share.adapters for share in shares if not share.rest), default=1)
    head = [
        element("th", element("h2", title), scope="col"),
        element("td"),
        _number("th", "all"),
        _number("th", "usable"),
    ]
    rows = [
        element(
            "tr",
            element("th", shown(share.label), scope="row"),
            element("td", "" if share.rest else _bar(share, most)),
            _number("td", f"{share.adapters:,}"),
            _number("td", f"{share.usable:,}"),
        )
        for share in shares
    ]
    longest = max(len(share.label) for share in shares)
    table = element("table", element("thead", element("tr", *head)), element("tbody", *rows))
    return element("section", table, class_="long" if longest > _SHORT else "short")


def _bar(share: Share, most: int) -> Html:
    usable, other = (f"{100 * count / most:.2f}" for count in (share.usable, share.adapters - share.usable))
    return element(
        "svg",
        element("rect", width=usable, height=1, class_="usable"),
        element("rect", x=usable, width=other, height=1, class_="other"),
        viewBox="0 0 100 1",
        preserveAspectRatio="none",
        aria_hidden="true",
    )


def _map(found: PoolMap | None) -> Html:
    """The map of similarity, or how to get one."""
    title = element("h2", "Map of similarity")
    if found is None:
        how = "lora pool list --where status=ok -q | lora pool verify - --deep"
        return element(
            "section", title, _faint("No three usable adapters have a sketch. Make them: ", how), class_="map"
        )
    places = _places(found)
    radius = min(max(_INK / len(places) ** 0.5, _SMALLEST), _LARGEST)
    dots = [
        element(
            "circle",
            element("title", point.id if point.status == "ok" else f"{point.id} ({point.status})"),
            cx=f"{x:.1f}",
            cy=f"{y:.1f}",
            r=f"{radius:.1f}",
            class_="usable" if point.status == "ok" else "other",
        )
        for point, (x, y) in zip(found.points, places, strict=True)
    ]
    names = _names([point.id for point in found.points], places, radius) if len(dots) <= _MOST_NAMED else []
    told = (
        f"{len(dots):,} of {counted(found.usable, 'usable adapter')} of ",
        shown(found.base) or "no declared base",
        " have a sketch (lora pool verify --deep). Similar updates lie near one another. "
        f"The axes hold {found.shares[0]:.0%} and {found.shares[1]:.0%} of the spread.",
    )
    drawn = element(
        "svg", *dots, *names, viewBox=f"0 0 {_WIDE + 2 * _EDGE:g} {_HIGH + 2 * _EDGE:g}", role="img", aria_label="Map"
    )
    return element("section", title, _faint(*told), drawn, class_="map")


def _places(found: PoolMap) -> list[tuple[float, float]]:
    """The points' (x, y) on the page, with one scale for both axes, so that distances are those of the map."""
    x, y = [point.x for point in found.points], [point.y for point in found.points]
    across, up = max(max(x) - min(x), _LEAST), max(max(y) - min(y), _LEAST)
    scale = min(_WIDE / across, _HIGH / up)
    left, top = _EDGE + (_WIDE - across * scale) / 2, _EDGE + (_HIGH - up * scale) / 2
    return [(left + (one - min(x)) * scale, top + (max(y) - other) * scale) for one, other in zip(x, y, strict=True)]


def _names(ids: Sequence[str], places: Sequence[tuple[float, float]], radius: float) -> list[Html]:
    """The names of points, each towards the middle of the map; one that would lie on another is left out."""
    drawn, taken = [], list[tuple[float, float, float]]()
    for id, (across, down) in zip(ids, places, strict=True):
        name, right = shown(id), across < _WIDE / 2
        wide = len(name) * _LETTER
        begin = across + 2 * radius if right else across - 2 * radius - wide
        if any(begin < end and first < begin + wide and abs(down - y) < _LINE for first, end, y in taken):
            continue
        taken.append((begin, begin + wide, down))
        where = {"x": f"{begin if right else begin + wide:.1f}", "y": f"{down + _LINE / 3:.1f}"}
        drawn.append(element("text", name, **where, text_anchor="start" if right else "end"))
    return drawn


def _square(name: str) -> Html:
    return element("svg", element("rect", width=1, height=1, class_=name), viewBox="0 0 1 1", class_="key")


def _number(name: str, text: str) -> Html:
    return element(name, text, class_="number")


def _table(adapters: Sequence[ReportedAdapter]) -> Html:
    sorted_by = {"downloads": {"aria_sort": "descending"}}
    head = [element("th", one.title, scope="col", **_class(one), **sorted_by.get(one.field, {})) for one in _COLUMNS]
    rows = [
        element("tr", *(element("td", _cell(row, one), **_class(one)) for one in _COLUMNS)) for row in adapters[:_PART]
    ]
    body = element("tbody", *rows)
    table = element("table", element("thead", element("tr", *head)), body, id="table", class_="adapters")
    first = f"The {len(rows):,} most downloaded of {counted(len(adapters), 'adapter')}."
    words = element("label", "Words in any text", Html('<input id="words" type="search" autocomplete="off">'))
    turn = [element("button", "Back", type="button", id="back"), element("button", "Next", type="button", id="on")]
    return element(
        "section",
        element("h2", "Adapters"),
        element("form", words, id="filters", hidden=""),
        element("nav", *turn, element("output", id="told"), id="pages", hidden="", aria_label="Parts of the table"),
        element("noscript", _faint(first, " A browser that runs scripts shows all.")),
        element("div", table, class_="scroll", tabindex=0, role="region", aria_label="Table of adapters"),
    )


def _class(column: _Column) -> dict[str, str]:
    return {} if column.kind == "text" else {"class_": "number"}


def _value(row: ReportedAdapter, column: _Column) -> Any:
    """A fact of an adapter, a text as it is shown. An id is never cut: it is there to be copied."""
    value = getattr(row, column.field)
    if column.field == "created_at":
        return shown(value[:10])
    if column.kind == "size":
        return value or None
    return safe(value) if column.field == "id" else shown(value) if column.kind == "text" else value


def _cell(row: ReportedAdapter, column: _Column) -> str:
    value = _value(row, column)
    if value is None or value == "":
        return _NOTHING
    return size(value) if column.kind == "size" else f"{value:,}" if column.kind == "number" else value


def _data(adapters: Sequence[ReportedAdapter]) -> list[dict[str, Any]]:
    """The table for the page's script, by columns; texts that repeat stand once, as words with numbers."""
    found = []
    for column in _COLUMNS:
        values = [_value(row, column) for row in adapters]
        one: dict[str, Any] = {"title": column.title, "kind": column.kind, "choice": column.choice}
        if column.kind == "text":
            places: dict[str, int] = {}
            values = [places.setdefault(value, len(places)) for value in values]
            one["words"] = list(places)
        found.append(one | {"values": values})
    return found
