"""A heat map in a page: every number is there, the largest is the fullest, and names are text and no markup."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from lora_cli.reports.heat import tiles

SVG = [[0.9, -0.1], [0.5, 0.75]]


def tree(*names: str, grid: list[list[float | None]] | None = None) -> ElementTree.Element:
    return ElementTree.fromstring(tiles("coefficients", names, names, grid or [[*line] for line in SVG]))


def test_numbers_stand_in_their_rows_and_columns() -> None:
    found = tree("one", "two")
    numbers = [text for text in found.iter("text") if re.fullmatch(r"-?\d\.\d\d", text.text or "")]
    places = {
        number.text: (float(square.attrib["x"]), float(square.attrib["y"]))
        for square, number in zip(found.iter("rect"), numbers, strict=True)
    }
    assert places["0.90"][1] == places["-0.10"][1] < places["0.50"][1] == places["0.75"][1]
    assert places["0.90"][0] == places["0.50"][0] < places["-0.10"][0] == places["0.75"][0]
    for square, number in zip(found.iter("rect"), numbers, strict=True):
        left, top = float(square.attrib["x"]), float(square.attrib["y"])
        assert left < float(number.attrib["x"]) < left + float(square.attrib["width"])
        assert top < float(number.attrib["y"]) < top + float(square.attrib["height"])


def test_the_largest_is_the_fullest_and_signs_have_their_class() -> None:
    found = [*tree("one", "two").iter("rect")]
    fullness = [float(square.attrib["fill-opacity"]) for square in found]
    assert fullness == pytest.approx([0.6, 0.6 / 9, 0.6 * 5 / 9, 0.6 * 7.5 / 9], abs=0.005)
    assert [square.attrib["class"] for square in found] == ["positive", "negative", "positive", "positive"]


def test_what_is_no_number_is_left_out() -> None:
    found = tree("one", "two", grid=[[0.5, None], [0.5, 0.5]])
    assert [square.attrib["fill-opacity"] for square in found.iter("rect")] == ["0.60"] * 3


def test_everything_lies_within_the_picture() -> None:
    found = tree("a-rather-long-name-of-an-adapter", "b")
    _, _, width, height = map(float, found.attrib["viewBox"].split())
    for square in found.iter("rect"):
        assert float(square.attrib["x"]) + float(square.attrib["width"]) <= width
        assert float(square.attrib["y"]) + float(square.attrib["height"]) <= height
    assert max(len(text.text or "") for text in found.iter("text")) == 24


def test_a_hostile_name_is_text() -> None:
    svg = tiles("<i>", ["</text><script>x()</script>", "b"], ["esc\x1b[31m", "d"], SVG)
    assert "<script" not in svg
    assert "\x1b" not in svg
    assert re.search(r"\sstyle=|\son\w+=", svg) is None
