"""The page and the Markdown of a study: what they show, and that no text of a stranger is more than text."""

import re

import pytest

from lora_cli.reports.study import study_page
from lora_cli.reports.study_markdown import study_markdown
from tests.reports.reading import Read
from tests.reports.study_samples import VALUES, sample
from tests.reports.test_page import HOSTILE, shape


def table_below(read: Read, *heads: str) -> list[list[str]]:
    """The rows of the one table with these first headings."""
    [rows] = [table[1:] for table in read.tables if table and table[0][: len(heads)] == list(heads)]
    return rows


def test_scores_gains_and_costs_stand_in_their_tables() -> None:
    read = Read(study_page(sample()))
    scores = table_below(read, "System", "Pool", "Score", "95 % interval")
    assert [row[:3] for row in scores] == [
        [system, pool or "–", f"{sum(values) / 40:.3f}"] for (system, pool), values in VALUES.items()
    ]
    gains = [table[1:] for table in read.tables if table[0][2:3] == ["Gain"]]
    assert [len(rows) for rows in gains] == [5, 5, 2]
    adaptive = next(row for row in gains[0] if row[:2] == ["adaptive", "relevant"])
    assert adaptive[2].startswith("+0.550 [")
    assert adaptive[5:8] == ["better", "22", "0"]
    assert next(row for row in gains[1] if row[:2] == ["adaptive", "relevant"])[5] == "not separable"
    costs = table_below(read, "System", "Pool", "Score", "Time")
    assert costs[1][3:] == ["28.0 s", "100"]


def test_the_verdict_the_answers_and_the_sources_are_there() -> None:
    found = sample()
    told = " ".join(Read(study_page(found)).texts)
    assert found.verdict.summary in told
    for answer in found.verdict.answers:
        assert answer.question in told
        assert answer.found in told
        assert answer.follows in told
    for text in (
        "What is 1 + 1?",
        "ties-random-s0: out of memory",
        "ties-random-s1",
        "1 failed",
        "from -0.400 to 0.600",
    ):
        assert text in told
    for used in found.adapters:
        assert used.pinned.partition("@")[0] in told
        assert used.pinned.partition("@")[2] in told


def test_every_system_has_a_dot_an_interval_and_a_place_by_its_cost() -> None:
    read = Read(study_page(sample()))
    kinds = [given.get("class") or "" for _, given in read.elements]
    assert kinds.count("dot recycled") == kinds.count("reach recycled") == 3
    assert kinds.count("dot control") == kinds.count("reach control") == 3
    assert sum(tag == "circle" for tag, _ in read.elements) == 6
    for tag, given in read.elements:
        if tag == "line" and "reach" in (given["class"] or ""):
            assert 0 <= float(given["x1"] or "") <= float(given["x2"] or "") <= 100


def test_tiles_have_the_sign_and_the_size_of_their_coefficients() -> None:
    found = sample()
    tiles = [given for tag, given in Read(study_page(found)).elements if tag == "rect" and "fill-opacity" in given]
    numbers = [number for line in found.learnt[0].values for number in line if number is not None]
    assert len(tiles) == len(numbers) == 24
    for given, number in zip(tiles, numbers, strict=True):
        assert given["class"] == ("negative" if number < 0 else "positive")
        assert float(given["fill-opacity"] or "") == pytest.approx(0.6 * abs(number) / 0.6, abs=0.006)


def test_a_map_of_many_modules_has_no_numbers_and_many_tiles_name_none() -> None:
    titles = {
        size: sum(tag == "title" for tag, _ in Read(study_page(sample(adapters=size, modules=112))).elements)
        for size in (2, 20)
    }
    assert titles[2] - titles[20] == 2 * 112


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_text_is_text_wherever_it_stands(text: str) -> None:
    def elements(read: Read) -> list[tuple[str, list[str]]]:
        return [one for one in shape(read) if one[0] != "br"]

    read = Read(study_page(sample(text)))
    assert elements(read) == elements(Read(study_page(sample("plain"))))
    assert read.others == []
    assert not {"\u202e", "\u2066", "\x1b", "\x00"} & set("".join(read.texts))


def test_hostile_names_of_systems_are_text_too() -> None:
    values = {(f"{HOSTILE[i]}{system}", pool): ours for i, ((system, pool), ours) in enumerate(VALUES.items())}
    read, plain = Read(study_page(sample(values=values))), Read(study_page(sample()))
    assert {tag for tag, _ in read.elements} <= {tag for tag, _ in plain.elements}
    assert {name for _, given in read.elements for name in given} <= {
        name for _, given in plain.elements for name in given
    }


def test_lines_of_10_kb_are_cut() -> None:
    assert len(study_page(sample("y" * 10_000))) < len(study_page(sample())) + 200_000
    told = Read(study_page(sample("y" * 10_000))).tables
    answers = next(table for table in told if table[0][0] == "Example")
    assert max(len(cell) for row in answers for cell in row) <= 304


def test_a_page_has_no_script_and_asks_for_nothing() -> None:
    page = study_page(sample())
    read = Read(page)
    assert "script-src 'none'; " in read.policy
    assert not any(tag == "script" for tag, _ in read.elements)
    assert not any(name == "style" or name.startswith("on") for _, given in read.elements for name in given)
    places = ("src", "srcset", "action", "data", "poster", "background", "ping", "xlink:href")
    assert not any(name in places for _, given in read.elements for name in given)
    assert page == study_page(sample())
    assert page.isascii()


def test_markdown_has_the_same_numbers_and_hostile_texts_are_text() -> None:
    found = study_markdown(sample())
    assert found.startswith("**Recycling helps, but is not shown")
    assert "| adaptive | relevant | 0.700 |" in found
    assert "not separable" in found
    assert "Failed: ties-random-s0: out of memory" in found
    assert "4 adapters: 4 mit." in found
    for text in HOSTILE:
        told = study_markdown(sample(text))
        assert not re.search(r"(?<!\\)[<`\[]", told), text
        assert told.count("\n") == found.count("\n")
