"""Intervals of scores and of their differences, p values, and what many comparisons do to them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_cli.records import LEVEL

Z95 = 1.959963984540054
RESAMPLES = 10_000
_CELLS_AT_ONCE = 2_000_000
# Shuffles of a table of values: as many as this many cells allow, between these bounds.
_SHUFFLED_CELLS, _FEWEST_SHUFFLES, _MOST_SHUFFLES = 20_000_000, 200, 2_000


class Interval(NamedTuple):
    """A 95 % interval."""

    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The mean of paired differences, its 95 % bootstrap interval, and a two-sided p value for "no difference"."""

    delta: float
    low: float
    high: float
    p: float

    @property
    def measurable(self) -> bool:
        """Whether the interval excludes zero and p is below 5 %: the interval alone is too narrow for few examples."""
        return (self.low > 0 or self.high < 0) and self.p < LEVEL


@dataclass(frozen=True, slots=True, kw_only=True)
class Chance:
    """The best score among several systems if all were alike: `expected`, and the share `p` that reaches the real one.

    All are alike if the values of an example could as well be exchanged between the systems.
    """

    expected: float
    p: float


def interval(score: str, values: Sequence[float], *, seed: int = 0) -> Interval:
    """The 95 % interval of the mean of `values`: Wilson's for the "share" of those that are 1, else the bootstrap's."""
    return wilson(round(math.fsum(values)), len(values)) if score == "share" else mean_interval(values, seed=seed)


def wilson(successes: int, n: int) -> Interval:
    """The Wilson 95 % interval of a proportion; within [0, 1] and never of zero width. Raises ValueError for n < 1."""
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"{successes} successes of {n}")
    share, square = successes / n, Z95**2
    centre = (share + square / (2 * n)) / (1 + square / n)
    half = Z95 / (1 + square / n) * math.sqrt(share * (1 - share) / n + square / (4 * n * n))
    low = 0.0 if successes == 0 else centre - half
    return Interval(low, 1.0 if successes == n else centre + half)


def mean_interval(values: Sequence[float], *, seed: int = 0) -> Interval:
    """The percentile bootstrap's 95 % interval of a mean. The same seed gives the same interval."""
    low, high = np.quantile(_resampled_means(_column(values), seed), (0.025, 0.975))
    return Interval(float(low), float(high))


def paired_difference(ours: Sequence[float], theirs: Sequence[float], *, seed: int = 0) -> Difference:
    """The difference of `ours` to `theirs` on the same examples: mean, paired bootstrap interval, p.

    p is exact for right/wrong values (`sign_test` on the pairs that differ, which is McNemar's exact test); for other
    values it comes from random sign flips, below 1e-4 from Hoeffding's bound on their p. Raises ValueError when the
    lengths differ or are 0.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} values cannot be paired with {len(theirs)}")
    differences = _column(ours) - _column(theirs)
    low, high = np.quantile(_resampled_means(differences, seed), (0.025, 0.975))
    if np.isin(differences, (-1.0, 0.0, 1.0)).all():
        p = sign_test(int((differences > 0).sum()), int((differences < 0).sum()))
    else:
        p = _sign_flip_p(differences, seed)
    return Difference(delta=float(differences.mean()), low=float(low), high=float(high), p=p)


def sign_test(wins: int, losses: int) -> float:
    """The exact two-sided binomial p of `wins` against `losses` under a fair coin; 1 when there is neither."""
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / (1 << n))


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for their number by Holm's step-down method, in the same order (Holm 1979).

    The k-th smallest of m counts (m − k + 1) times, and at least as much as smaller ones. Where those below 5 % are
    taken for real, the probability that even one of these is chance stays below 5 %, however they depend on each other.
    """
    m, least = len(p_values), 0.0
    corrected = [0.0] * m
    for smaller, place in enumerate(sorted(range(m), key=lambda place: p_values[place])):
        least = max(least, min(1.0, (m - smaller) * p_values[place]))
        corrected[place] = least
    return corrected


def best_by_chance(values: Sequence[Sequence[float]], *, better: str, seed: int = 0) -> Chance:
    """The best mean that chance alone gives one of several equal systems.

    The values of each example are shuffled among the systems, again and again, so that an example stays as hard as it
    is and no system is better than another. 200 to 2,000 shuffles by the size of the table; the same seed gives the
    same result.

    Args:
        values: of each system, its values of the same examples.
        better: the best mean is the highest ("higher") or the lowest ("lower").
    """
    sign = -1.0 if better == "lower" else 1.0
    table = sign * np.asarray(values, dtype=np.float64).T  # (examples, systems)
    rng, left = np.random.default_rng(seed), min(_MOST_SHUFFLES, max(_FEWEST_SHUFFLES, _SHUFFLED_CELLS // table.size))
    at_once, found = max(1, _CELLS_AT_ONCE // table.size), []
    for start in range(0, left, at_once):
        shuffled = np.repeat(table[None], min(at_once, left - start), axis=0)
        found.append(rng.permuted(shuffled, axis=2).mean(axis=1).max(axis=1))
    best, real = np.concatenate(found), float(table.mean(axis=0).max())
    reached = int((best >= real - 1e-12 * max(1.0, abs(real))).sum())
    return Chance(expected=sign * float(best.mean()), p=(reached + 1) / (left + 1))


def _column(values: Sequence[float]) -> NDArray[np.float64]:
    column = np.asarray(values, dtype=np.float64)
    if column.size == 0:
        raise ValueError("no values")
    return column


def _resampled_means(values: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    rng, n = np.random.default_rng(seed), len(values)
    rows = max(1, _CELLS_AT_ONCE // n)
    means = [
        values[rng.integers(0, n, size=(min(rows, RESAMPLES - start), n))].mean(axis=1)
        for start in range(0, RESAMPLES, rows)
    ]
    return np.concatenate(means)


def _sign_flip_p(differences: NDArray[np.float64], seed: int) -> float:
    rng, n = np.random.default_rng(seed), len(differences)
    observed, rows, as_extreme = abs(float(differences.sum())), max(1, _CELLS_AT_ONCE // n), 0
    for start in range(0, RESAMPLES, rows):
        signs = rng.integers(0, 2, size=(min(rows, RESAMPLES - start), n)) * 2 - 1
        as_extreme += int((np.abs(signs @ differences) >= observed * (1 - 1e-12)).sum())
    # Draws cannot show a p below 1e-4, which a correction for hundreds of systems needs; Hoeffding's bound on the
    # exact p can.
    bound = 2 * math.exp(-(observed**2) / (2 * float(differences @ differences)))
    return min(bound, (as_extreme + 1) / (RESAMPLES + 1))
