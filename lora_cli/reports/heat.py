"""A heat map in a page: numbers in squares, the larger the darker, in the page's own ink so that it fits any theme."""

import math
from collections.abc import Sequence

from lora_cli.reports.page import Html, element, shown

_CELL, _LETTER, _LINE = 44.0, 7.0, 4.0
_DARKEST = 0.35
"""The share of the page's ink in the cell of the largest number: text stays readable on it."""
_LONGEST = 18


def heat(title: str, rows: Sequence[str], columns: Sequence[str], grid: Sequence[Sequence[float]]) -> Html:
    """`grid` (rows, columns) as an inline SVG with its numbers; a number that is not finite leaves its square empty."""
    finite = [number for line in grid for number in line if math.isfinite(number)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    left = _LETTER * max((len(_short(row)) for row in rows), default=0) + 8
    top = _LETTER * max((len(_short(column)) for column in columns), default=0) + 8
    cells = [
        _cell(number, (number - low) / (high - low or 1.0), left + j * _CELL, top + i * _CELL)
        for i, line in enumerate(grid)
        for j, number in enumerate(line)
        if math.isfinite(number)
    ]
    names = [
        _text(_short(row), left - 6, top + (i + 0.5) * _CELL + _LINE, text_anchor="end") for i, row in enumerate(rows)
    ]
    for j, column in enumerate(columns):
        x = left + (j + 0.5) * _CELL + _LINE
        names.append(_text(_short(column), x, top - 6, transform=f"rotate(-90 {x:.1f} {top - 6:.1f})"))
    width, height = left + len(columns) * _CELL, top + len(rows) * _CELL
    size = {"viewBox": f"0 0 {width:.1f} {height:.1f}", "width": f"{width:.0f}", "height": f"{height:.0f}"}
    return element("svg", element("title", title), *cells, *names, role="img", fill="currentColor", **size)


def _cell(number: float, share: float, x: float, y: float) -> Html:
    square = element(
        "rect",
        x=f"{x:.1f}",
        y=f"{y:.1f}",
        width=f"{_CELL - 1:g}",
        height=f"{_CELL - 1:g}",
        fill_opacity=f"{_DARKEST * share:.3f}",
    )
    return element("g", square, _text(f"{number:.2f}", x + _CELL / 2, y + _CELL / 2 + _LINE, text_anchor="middle"))


def _text(text: str, x: float, y: float, **attributes: str) -> Html:
    return element("text", text, x=f"{x:.1f}", y=f"{y:.1f}", font_size="12", **attributes)


def _short(text: str) -> str:
    whole = shown(text)
    return whole if len(whole) <= _LONGEST else f"{whole[: _LONGEST - 1]}…"
