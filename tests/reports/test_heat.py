"""A heat map in a page: every number is there, the largest is the darkest, and names are text and no markup."""

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from lora_cli.reports.heat import heat

SVG = [[0.9, 0.1], [0.5, 0.75]]


def tree(*names: str, grid: list[list[float]] = SVG) -> ElementTree.Element:
    return ElementTree.fromstring(heat("after learning", names, names, grid))


def test_numbers_stand_in_their_rows_and_columns() -> None:
    found = tree("one", "two")
    places = {}
    for group in found.iter("g"):
        square, number = group.find("rect"), group.find("text")
        assert square is not None
        assert number is not None
        places[number.text] = (float(square.attrib["x"]), float(square.attrib["y"]))
    assert places["0.90"][1] == places["0.10"][1] < places["0.50"][1] == places["0.75"][1]
    assert places["0.90"][0] == places["0.50"][0] < places["0.10"][0] == places["0.75"][0]


def test_the_largest_is_the_darkest_and_the_least_is_clear() -> None:
    darkness = [float(square.attrib["fill-opacity"]) for square in tree("one", "two").iter("rect")]
    assert darkness == pytest.approx([0.35, 0.0, 0.35 * 0.5, 0.35 * 0.8125], abs=1e-3)


def test_all_alike_are_clear_and_what_is_no_number_is_left_out() -> None:
    found = tree("one", "two", grid=[[0.5, math.nan], [0.5, 0.5]])
    assert [square.attrib["fill-opacity"] for square in found.iter("rect")] == ["0.000"] * 3


def test_everything_lies_within_the_picture() -> None:
    found = tree("a-rather-long-name-of-a-task", "b")
    _, _, width, height = map(float, found.attrib["viewBox"].split())
    for square in found.iter("rect"):
        assert float(square.attrib["x"]) + float(square.attrib["width"]) <= width
        assert float(square.attrib["y"]) + float(square.attrib["height"]) <= height
    assert max(len(text.text or "") for text in found.iter("text")) == 18


def test_a_hostile_name_is_text() -> None:
    svg = heat("<i>", ["</text><script>x()</script>", "b"], ["esc\x1b[31m", "d"], SVG)
    assert "<script" not in svg
    assert "\x1b" not in svg
    assert re.search(r"\sstyle=|\son\w+=", svg) is None
