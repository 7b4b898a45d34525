"""How many examples show a difference, and what the best of several is worth: beside simulations in float64."""

import numpy as np
import pytest

from lora_cli.scores import fewest_pairs, honest_best, least_measurable, paired_differences, pairs_needed, sign_test


def test_so_many_examples_show_the_difference_in_four_of_five_studies() -> None:
    delta, spread = 0.5, 1.0
    n = pairs_needed(delta, spread)
    assert n == 32
    draw = np.random.default_rng(0)
    studies = draw.normal(delta, spread, (400, n))
    shown = [one.p < 0.05 for one in paired_differences(studies.tolist(), [0.0] * n)]
    assert 0.73 < np.mean(shown) < 0.86
    assert least_measurable(spread, n) == pytest.approx(delta, rel=0.02)


def test_the_number_falls_with_the_square_of_the_difference_and_has_a_floor() -> None:
    assert pairs_needed(0.05, 1.0) == pytest.approx(100 * (1.959964 + 0.841621) ** 2 / 0.25, abs=1)
    assert pairs_needed(-0.5, 1.0) == pairs_needed(0.5, 1.0)
    assert pairs_needed(1.0, 0.0) == fewest_pairs() == 6
    assert pairs_needed(0.0, 1.0) is None


@pytest.mark.parametrize("comparisons", [1, 2, 5, 70])
def test_fewer_examples_cannot_be_measurable(comparisons: int) -> None:
    n = fewest_pairs(comparisons)
    assert comparisons * sign_test(n, 0) < 0.05 <= comparisons * sign_test(n - 1, 0)


def test_the_best_of_equal_systems_is_worth_nothing_on_other_examples() -> None:
    draw, found, flattered = np.random.default_rng(1), [], []
    for seed in range(20):
        gains = draw.normal(0.0, 1.0, (15, 40))
        found.append(honest_best(gains.tolist(), seed=seed))
        flattered.append(gains.mean(axis=1).max())
    assert np.mean(flattered) > 0.2
    assert abs(np.mean(found)) < 0.1


def test_a_clear_best_keeps_its_gain() -> None:
    draw = np.random.default_rng(2)
    gains = [draw.normal(2.0, 1.0, 60).tolist(), draw.normal(0.0, 1.0, 60).tolist()]
    assert honest_best(gains) == pytest.approx(np.mean(gains[0]), abs=0.02)
    assert honest_best(gains[:1]) == pytest.approx(np.mean(gains[0]), abs=0.02)
    assert honest_best(gains) == honest_best(gains)
