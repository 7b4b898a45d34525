import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from lora_cli.scores import best_by_chance, holm, interval, paired_difference, sign_test, wilson


# The values of the formula worked out apart from the code: Newcombe (1998), table I, method 3.
@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_newcombes_published_values(k: int, n: int, low: float, high: float) -> None:
    assert wilson(k, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_bounds_solve_the_score_equation(case: tuple[int, int]) -> None:
    k, n = case
    low, high = wilson(k, n)
    assert 0 <= low <= k / n <= high <= 1
    assert low < high
    for bound in (low, high):
        if 0 < bound < 1:
            z = (k / n - bound) / math.sqrt(bound * (1 - bound) / n)
            assert abs(z) == pytest.approx(1.959964, abs=1e-5)


@pytest.mark.parametrize("case", [(3, 2), (-1, 2), (0, 0)])
def test_wilson_wants_a_proportion(case: tuple[int, int]) -> None:
    with pytest.raises(ValueError):
        wilson(*case)


@pytest.mark.parametrize(("wins", "losses"), list(itertools.product(range(7), repeat=2)))
def test_sign_test_equals_counting_all_coin_tosses(wins: int, losses: int) -> None:
    n, fewer = wins + losses, min(wins, losses)
    tosses = [sum(toss) for toss in itertools.product((0, 1), repeat=n)]
    both_tails = sum(heads <= fewer or heads >= n - fewer for heads in tosses) / len(tosses)
    assert sign_test(wins, losses) == pytest.approx(both_tails)


def test_the_sign_test_gives_known_values() -> None:
    assert sign_test(8, 2) == pytest.approx(112 / 1024)
    assert sign_test(900, 1100) == pytest.approx(8.5e-6, rel=0.05)


def test_the_sign_test_is_scipys_binomial_test() -> None:
    for wins, losses in [(0, 1), (3, 3), (8, 2), (41, 60), (300, 211), (0, 100)]:
        scipys = binomtest(wins, wins + losses, 0.5).pvalue
        assert sign_test(wins, losses) == pytest.approx(scipys, rel=1e-9)


@given(st.lists(st.sampled_from([0.0, 0.001, 0.01, 0.02, 0.04, 0.2, 0.9, 1.0]) | st.floats(0, 1), max_size=6))
def test_holm_is_the_closed_test_of_all_subsets(p_values: list[float]) -> None:
    # A hypothesis falls if every set of hypotheses that holds it falls by Bonferroni.
    places = range(len(p_values))
    subsets = [one for size in places for one in itertools.combinations(places, size + 1)]
    closed = [
        max(min(1.0, len(one) * min(p_values[k] for k in one)) for one in subsets if place in one) for place in places
    ]
    assert holm(p_values) == pytest.approx(closed, abs=1e-12)


def test_holm_gives_known_values() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.2]) == [0.2]


TABLES = {
    "shares": [[1, 0, 1], [1, 1, 1], [0, 0, 1]],
    "means": [[0.5, 2.0, 1.0], [0.1, 1.5, 1.25], [0.75, 3.0, 0.5]],
    "alike": [[1, 0, 1], [1, 0, 1], [1, 0, 1]],
}


@pytest.mark.parametrize("better", ["higher", "lower"])
@pytest.mark.parametrize("table", TABLES)
def test_the_best_by_chance_is_that_of_all_exchanges_of_answers(table: str, better: str) -> None:
    values, best = TABLES[table], max if better == "higher" else min
    real = best(sum(system) / 3 for system in values)
    each = [
        best(sum(system) / 3 for system in zip(*rows, strict=True))
        for rows in itertools.product(*(itertools.permutations(row) for row in zip(*values, strict=True)))
    ]
    reached = sum(one >= real - 1e-9 if better == "higher" else one <= real + 1e-9 for one in each) / len(each)
    found = best_by_chance(values, better=better)
    assert found.expected == pytest.approx(sum(each) / len(each), abs=0.02)
    assert found.p == pytest.approx(reached, abs=0.04)
    assert found == best_by_chance(values, better=better)


def test_one_that_is_better_than_many_is_beyond_chance_and_the_best_of_equals_is_not() -> None:
    rng = np.random.default_rng(3)
    alike = (rng.random((40, 100)) < 0.5).astype(float).tolist()
    luck = best_by_chance(alike, better="higher")
    # 40 independent shares of 100 tosses: the expected greatest, from the binomial distribution.
    below = np.cumsum([math.comb(100, k) / 2**100 for k in range(100)])
    assert luck.expected == pytest.approx((1 - below**40).sum() / 100, abs=0.02)
    assert luck.p > 0.05
    assert best_by_chance([*alike[1:], [1.0] * 90 + [0.0] * 10], better="higher").p < 0.002


def test_mean_interval_agrees_with_the_normal_one_on_many_values() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, size=2000)
    low, high = interval("mean", values.tolist())
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=0.01)
    assert high == pytest.approx(values.mean() + half, abs=0.01)


def test_paired_difference_of_right_and_wrong_answers_is_mcnemars_exact_test() -> None:
    ours = [1.0] * 8 + [0.0] * 2 + [1.0] * 30 + [0.0] * 10
    theirs = [0.0] * 8 + [1.0] * 2 + [1.0] * 30 + [0.0] * 10
    found = paired_difference(ours, theirs)
    assert found.delta == pytest.approx(6 / 50)
    assert found.p == pytest.approx(112 / 1024)
    half = 1.96 * np.subtract(ours, theirs).std() / math.sqrt(50)
    assert (found.low, found.high) == pytest.approx((0.12 - half, 0.12 + half), abs=0.025)
    assert not found.measurable


def test_paired_difference_uses_the_pairing() -> None:
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 10, size=100)
    found = paired_difference((hard + 0.1 + rng.normal(0, 0.05, 100)).tolist(), hard.tolist())
    assert found.measurable
    assert found.low == pytest.approx(0.09, abs=0.015)
    assert found.p < 0.001


def test_sign_flip_p_equals_counting_all_flips() -> None:
    differences = [0.3, -0.1, 0.8, 0.5, -0.2, 0.9, 0.4, 0.05]
    flips = [abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
             for signs in itertools.product((1, -1), repeat=len(differences))]  # fmt: skip
    exact = sum(flip >= sum(differences) - 1e-9 for flip in flips) / len(flips)
    assert paired_difference(differences, [0.0] * 8).p == pytest.approx(exact, abs=0.01)


def test_flips_that_are_as_extreme_but_for_rounding_are_counted() -> None:
    # Added up in another order, the four come to a little less than numpy's sum of them.
    differences = [0.7, 0.3, 0.1, 0.3]
    assert paired_difference(differences, [0.0] * 4).p == pytest.approx(2 / 16, abs=0.02)


def test_strong_evidence_shows_below_what_draws_can_show() -> None:
    found = paired_difference([0.25] * 50, [0.0] * 50)
    assert 2 / 2**50 < found.p == pytest.approx(2 * math.exp(-25))
    assert found.measurable


def test_two_examples_measure_nothing() -> None:
    for ours in ([1.0, 1.0], [0.3, 0.2]):
        found = paired_difference(ours, [0.0, 0.0])
        assert found.low > 0
        assert found.p == pytest.approx(0.5, abs=0.02)
        assert not found.measurable


def test_no_difference_is_not_measurable() -> None:
    found = paired_difference([1.0, 0.0, 1.0], [1.0, 0.0, 1.0])
    assert (found.delta, found.low, found.high, found.p) == (0, 0, 0, 1)
    assert not found.measurable


def test_the_seed_decides_the_interval() -> None:
    ours, theirs = [0.1, 0.9, 0.4, 0.7], [0.2, 0.3, 0.1, 0.9]
    assert paired_difference(ours, theirs, seed=1) == paired_difference(ours, theirs, seed=1)
    assert paired_difference(ours, theirs, seed=1) != paired_difference(ours, theirs, seed=2)


def test_values_that_cannot_be_paired() -> None:
    with pytest.raises(ValueError):
        paired_difference([1.0], [1.0, 2.0])
    with pytest.raises(ValueError):
        paired_difference([], [])
