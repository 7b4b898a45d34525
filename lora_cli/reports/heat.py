"""A heat map in a page: tiles in two colours by sign, for many columns."""

from collections.abc import Sequence

from lora_cli.reports.page import Html, element, shown

_CELL, _LETTER, _LINE = 44.0, 7.0, 4.0
_LONGEST = 24
_TILE, _TALL, _FULL = 15.0, 20.0, 0.6
"""The width of a tile without a number, the height of any, and the most opaque one below a number."""
_MOST_WITH_NUMBERS, _MOST_TOLD = 12, 2_000
"""The columns of tiles with numbers, and the tiles of a map whose tiles tell their numbers when they are pointed at."""


def tiles(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    grid: Sequence[Sequence[float | None]],
    *,
    most: float | None = None,
) -> Html:
    """`grid` (rows, columns) as an inline SVG of tiles: class positive or negative, full at the magnitude `most`.

    Up to 12 columns have their numbers; None leaves its tile empty. Without `most` the largest magnitude is full.
    """
    if most is None:
        most = max((abs(number) for line in grid for number in line if number is not None), default=0.0)
    most = most or 1.0
    has_numbers = len(columns) <= _MOST_WITH_NUMBERS
    is_told = not has_numbers and len(rows) * len(columns) <= _MOST_TOLD
    wide = _CELL if has_numbers else _TILE
    rows, columns = ([_short(name) for name in names] for names in (rows, columns))
    left, top = _margins(rows, columns)
    cells = []
    for i, line in enumerate(grid):
        for j, number in enumerate(line):
            if number is not None:
                x, y = left + j * wide, top + i * _TALL
                told = [element("title", f"{rows[i]}, {columns[j]}: {number:.4f}")] if is_told else []
                cells.append(_tile(number, abs(number) / most * (_FULL if has_numbers else 1.0), (x, y, wide), told))
                if has_numbers:
                    middle = y + _TALL / 2 + _LINE
                    cells.append(_text(f"{number:.2f}", x + wide / 2, middle, text_anchor="middle"))
    return _framed(title, rows, columns, cells, (wide, _TALL))


def _tile(number: float, opacity: float, place: tuple[float, float, float], told: Sequence[Html]) -> Html:
    """A tile at (x, y) of a width."""
    return element(
        "rect",
        *told,
        x=f"{place[0]:.0f}",
        y=f"{place[1]:.0f}",
        width=f"{place[2] - 1:g}",
        height=f"{_TALL - 1:g}",
        fill_opacity=f"{opacity:.2f}",
        class_="negative" if number < 0 else "positive",
    )


def _margins(rows: Sequence[str], columns: Sequence[str]) -> tuple[float, float]:
    """The room for names on the left and above."""
    left = _LETTER * max(map(len, rows), default=0) + 8
    return left, _LETTER * max(map(len, columns), default=0) + 8


def _framed(
    title: str, rows: Sequence[str], columns: Sequence[str], cells: Sequence[Html], step: tuple[float, float]
) -> Html:
    """The squares of a map with the names of its rows and columns; `step` is a square's width and height."""
    (left, top), (wide, high) = _margins(rows, columns), step
    names = [_text(row, left - 6, top + (i + 0.5) * high + _LINE, text_anchor="end") for i, row in enumerate(rows)]
    for j, column in enumerate(columns):
        x = left + (j + 0.5) * wide + _LINE
        names.append(_text(column, x, top - 6, transform=f"rotate(-90 {x:.1f} {top - 6:.1f})"))
    width, height = left + len(columns) * wide, top + len(rows) * high
    size = {"viewBox": f"0 0 {width:.1f} {height:.1f}", "width": f"{width:.0f}", "height": f"{height:.0f}"}
    return element("svg", element("title", title), *cells, *names, role="img", fill="currentColor", **size)


def _text(text: str, x: float, y: float, **attributes: str) -> Html:
    return element("text", text, x=f"{x:.1f}", y=f"{y:.1f}", font_size="12", **attributes)


def _short(text: str) -> str:
    whole = shown(text)
    return whole if len(whole) <= _LONGEST else f"{whole[: _LONGEST - 1]}…"
