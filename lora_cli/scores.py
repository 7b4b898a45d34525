"""Intervals of scores and of their differences: Wilson, paired bootstrap, exact sign test."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Z95 = 1.959963984540054
RESAMPLES = 10_000
_CELLS_AT_ONCE = 2_000_000


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
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


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
    values it comes from random sign flips. Raises ValueError when the lengths differ or are 0.
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
    return (as_extreme + 1) / (RESAMPLES + 1)
