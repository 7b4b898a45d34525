"""Words for people: no rounding hides a loss, no unit is left out, and one thing is singular."""

import pytest

from lora_cli.text import counted, duration, in_words, interval, percent, size


def test_a_list_ends_with_and() -> None:
    assert [in_words(words) for words in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and c"]


def test_only_one_thing_is_singular() -> None:
    assert [counted(number, "row") for number in (0, 1, 2, 1200)] == ["0 rows", "1 row", "2 rows", "1,200 rows"]


@pytest.mark.parametrize(
    ("share", "words"),
    [
        (0.0, "0 %"), (1e-9, "under 0.01 %"), (9.9e-5, "under 0.01 %"), (1e-4, "0.01 %"), (0.00449, "0.45 %"),
        (0.01, "1 %"), (0.25, "25 %"), (0.3333, "33.3 %"), (0.99951, "99.9 %"), (0.999998, "99.9 %"),
        (1 - 1e-7, "100 %"), (1.0, "100 %"), (1 + 1e-7, "100 %"),
        (1.0004, "100 %"), (1.5, "150 %"), (12.345, "1234.5 %"),
    ],
)  # fmt: skip
def test_a_share_is_all_of_it_only_if_nothing_is_lost(share: float, words: str) -> None:
    assert percent(share) == words


def test_an_interval_has_one_form() -> None:
    assert interval(0.1, 0.25) == "[0.100, 0.250]"
    assert interval(-0.1, 0.25, places=2, signed=True) == "[-0.10, +0.25]"


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0 B"), (999, "999 B"), (999.6, "1.0 kB"), (1000, "1.0 kB"), (999_499, "999.5 kB"), (999_500, "1.0 MB"),
        (1_500_000_000, "1.5 GB"), (2.5e12, "2.5 TB"), (4e15, "4000.0 TB"),
    ],
)  # fmt: skip
def test_a_size_has_the_unit_in_which_it_is_shortest(count: float, words: str) -> None:
    assert size(count) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0.0 s"), (59.94, "59.9 s"), (59.96, "1 min 00 s"), (61.4, "1 min 01 s"), (3599.4, "59 min 59 s"),
        (3599.6, "1 h 00 min"), (3661, "1 h 01 min"), (90_000, "25 h 00 min"),
    ],
)  # fmt: skip
def test_a_duration_never_has_sixty_of_a_unit(seconds: float, words: str) -> None:
    assert duration(seconds) == words
