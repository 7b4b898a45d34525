"""Charts of a study's page, as inline SVG: scores with their intervals, and scores by cost."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from lora_cli.reports.page import Html, element, joined, shown

_WIDE, _HIGH, _LEFT, _RIGHT, _TOP, _BOTTOM = 420.0, 260.0, 44.0, 14.0, 14.0, 34.0
_RADIUS, _LETTER, _LINE = 5.0, 6.5, 12.0
_WIDE_RANGE = 20.0
"""Costs that differ by more than this factor stand on a logarithmic axis."""


class Mark(NamedTuple):
    """A system with its score, the interval of the score, and what it cost; controls are drawn fainter."""

    name: str
    value: float
    low: float
    high: float
    is_control: bool
    cost: float | None = None


def intervals_chart(marks: Sequence[Mark], reference: float | None) -> Html:
    """Each system's score as a dot with its interval, in a table so that names wrap; a dashed line at `reference`."""
    low = min(mark.low for mark in marks)
    high = max(mark.high for mark in marks)
    room = (high - low or 1.0) * 0.04

    def at(value: float) -> str:
        return f"{100 * (value - low + room) / (high - low + 2 * room):.2f}"

    rows = [
        element("tr", element("th", shown(mark.name), scope="row"), element("td", _interval(mark, reference, at)))
        for mark in marks
    ]
    ends = element("div", element("span", f"{low:.3f}"), element("span", f"{high:.3f}"), class_="axis")
    foot = element("tfoot", element("tr", element("td"), element("td", ends)))
    return element("table", element("tbody", *rows), foot, class_="marks")


def _interval(mark: Mark, reference: float | None, at: Callable[[float], str]) -> Html:
    kind = _kind(mark)
    line = element("line", x1=at(mark.low), x2=at(mark.high), y1=5, y2=5, class_=f"reach {kind}")
    dot = element("path", d=f"M{at(mark.value)} 5h0", class_=f"dot {kind}")
    told = element("title", f"{shown(mark.name)}: {mark.value:.3f} [{mark.low:.3f}, {mark.high:.3f}]")
    beside = [] if reference is None else [_reference(at(reference))]
    return element("svg", told, *beside, line, dot, viewBox="0 0 100 10", preserveAspectRatio="none", role="img")


def _reference(x: str) -> Html:
    return element("line", x1=x, x2=x, y1=0, y2=10, class_="reference")


def cost_chart(title: str, marks: Sequence[Mark], axis: str) -> Html:
    """Each system's score over its cost, which is known for all; names are left out where they would overlap."""
    costs, values = [mark.cost or 0.0 for mark in marks], [mark.value for mark in marks]
    is_log = min(costs) > 0 and max(costs) > _WIDE_RANGE * min(costs)
    x = _placed([math.log10(cost) if is_log else cost for cost in costs], _LEFT, _WIDE - _RIGHT)
    y = _placed(values, _HIGH - _BOTTOM, _TOP)
    dots = [
        element(
            "circle",
            element("title", f"{shown(mark.name)}: {mark.value:.3f}, {mark.cost:.3g} {axis}"),
            cx=f"{across:.1f}",
            cy=f"{down:.1f}",
            r=f"{_RADIUS:g}",
            class_=_kind(mark),
        )
        for mark, across, down in zip(marks, x, y, strict=True)
    ]
    names = _names([shown(mark.name) for mark in marks], list(zip(x, y, strict=True)))
    scale = f"{axis}{', logarithmic' if is_log else ''}"
    return element(
        "svg",
        element("title", title),
        _edges(),
        *_ticks(min(costs), max(costs), scale, min(values), max(values)),
        *dots,
        *names,
        viewBox=f"0 0 {_WIDE:g} {_HIGH:g}",
        role="img",
    )


def _edges() -> Html:
    bottom, left = _HIGH - _BOTTOM + 2 * _RADIUS, _LEFT - 2 * _RADIUS
    across = element("line", x1=left, x2=_WIDE - _RIGHT, y1=bottom, y2=bottom, class_="edge")
    return joined(across, element("line", x1=left, x2=left, y1=_TOP, y2=bottom, class_="edge"))


def _ticks(least: float, most: float, scale: str, low: float, high: float) -> list[Html]:
    """The ends of both axes in numbers."""
    below, middle = _HIGH - _BOTTOM + 2 * _RADIUS + _LINE, (_LEFT + _WIDE - _RIGHT) / 2
    found = [
        _text(f"{least:.3g}", _LEFT, below, "middle"),
        _text(scale, middle, below, "middle"),
        _text(f"{low:.3f}", _LEFT - 2 * _RADIUS - 2, _HIGH - _BOTTOM + _LINE / 3, "end"),
    ]
    found += [_text(f"{most:.3g}", _WIDE - _RIGHT, below, "end")] if most > least else []
    found += [_text(f"{high:.3f}", _LEFT - 2 * _RADIUS - 2, _TOP + _LINE / 3, "end")] if high > low else []
    return found


def _text(text: str, x: float, y: float, anchor: str) -> Html:
    return element("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, class_="faint")


def _placed(values: Sequence[float], start: float, end: float) -> list[float]:
    """The values on an axis from `start` to `end`; equal ones in its middle."""
    low, high = min(values), max(values)
    if high == low:
        return [(start + end) / 2] * len(values)
    return [start + (value - low) / (high - low) * (end - start) for value in values]


def _names(names: Sequence[str], places: Sequence[tuple[float, float]]) -> list[Html]:
    """The names beside their dots, on the side with more room if it is free, else on the other, else left out.

    They stay within the axes, whose numbers stand outside.
    """
    drawn, taken = [], [(x - _RADIUS, x + _RADIUS, y) for x, y in places]
    for name, (across, down) in zip(names, places, strict=True):
        wide, beside = len(name) * _LETTER, 2 * _RADIUS
        sides = [(across + beside, "start", across + beside), (across - beside - wide, "end", across - beside)]
        for begin, anchor, x in sides if across < _WIDE / 2 else sides[::-1]:
            if begin >= _LEFT - 2 * _RADIUS and begin + wide <= _WIDE and not _lies_on(begin, wide, down, taken):
                taken.append((begin, begin + wide, down))
                y = f"{down + _LINE / 3:.1f}"
                drawn.append(element("text", name, x=f"{x:.1f}", y=y, text_anchor=anchor))
                break
    return drawn


def _lies_on(begin: float, wide: float, down: float, taken: Sequence[tuple[float, float, float]]) -> bool:
    return any(begin < end and first < begin + wide and abs(down - y) < _LINE for first, end, y in taken)


def _kind(mark: Mark) -> str:
    return "control" if mark.is_control else "recycled"
