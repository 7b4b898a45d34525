"""Intervals of scores and of their differences, p values, and what many comparisons do to them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_cli.records import LEVEL
from lora_cli.text import counted

Z95 = 1.959963984540054
_Z80 = 0.8416212335729143
RESAMPLES = 10_000
_CELLS_AT_ONCE = 2_000_000
# Shuffles of a table of values: as many as this many cells allow, between these bounds.
_SHUFFLED_CELLS, _FEWEST_SHUFFLES, _MOST_SHUFFLES = 20_000_000, 200, 2_000
_SPLITS = 1_000


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
    return intervals(score, [values], seed=seed)[0]


def intervals(score: str, table: Sequence[Sequence[float]], *, seed: int = 0) -> list[Interval]:
    """The `interval` of each of several systems' values of the same examples."""
    if score == "share":
        return [wilson(round(math.fsum(values)), len(values)) for values in table]
    return _mean_intervals(_columns(table), seed)


def wilson(successes: int, n: int) -> Interval:
    """The Wilson 95 % interval of a proportion; within [0, 1] and never of zero width. Raises ValueError for n < 1."""
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"{successes} successes of {n}")
    share, square = successes / n, Z95**2
    centre = (share + square / (2 * n)) / (1 + square / n)
    half = Z95 / (1 + square / n) * math.sqrt(share * (1 - share) / n + square / (4 * n * n))
    low = 0.0 if successes == 0 else centre - half
    return Interval(low, 1.0 if successes == n else centre + half)


def paired_difference(ours: Sequence[float], theirs: Sequence[float], *, seed: int = 0) -> Difference:
    """The difference of `ours` to `theirs` on the same examples: mean, paired bootstrap interval, p.

    p is exact for right/wrong values (`sign_test` on the pairs that differ, which is McNemar's exact test); for other
    values it comes from random sign flips, below 1e-4 from Hoeffding's bound on their p. Raises ValueError when the
    lengths differ or are 0.
    """
    return paired_differences([ours], theirs, seed=seed)[0]


def paired_differences(table: Sequence[Sequence[float]], theirs: Sequence[float], *, seed: int = 0) -> list[Difference]:
    """The `paired_difference` of each of several systems' values to `theirs`; they share their resamples."""
    for ours in table:
        if len(ours) != len(theirs):
            raise ValueError(f"{len(ours)} values cannot be paired with {len(theirs)}")
    if not table:
        return []
    differences = _columns(table) - _columns([theirs])
    exact = np.asarray(np.isin(differences, (-1.0, 0.0, 1.0)).all(axis=0))
    p_values = iter(_sign_flip_p(differences[:, ~exact], seed))
    found = []
    for column, low_high, is_exact in zip(differences.T, _mean_intervals(differences, seed), exact, strict=True):
        p = sign_test(int((column > 0).sum()), int((column < 0).sum())) if is_exact else float(next(p_values))
        found.append(Difference(delta=float(column.mean()), low=low_high.low, high=low_high.high, p=p))
    return found


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


def fewest_pairs(comparisons: int = 1) -> int:
    """The fewest examples on which a difference can be measurable among so many comparisons, were all of one sign.

    Both the exact test and random sign flips give n differences of one sign p = 2^(1 − n) at least.
    """
    return next(n for n in range(1, 64) if comparisons * 2.0 ** (1 - n) < LEVEL)


def too_few(examples: int, what: str, comparisons: int = 1) -> str:
    """The sentence about fewer examples than `fewest_pairs`, without its full stop; "" for as many or more.

    Args:
        what: the word for one of them.
    """
    least = fewest_pairs(comparisons)
    if examples >= least:
        return ""
    among = f" among {counted(comparisons, 'comparison')}" if comparisons > 1 else ""
    return f"{counted(examples, what)} cannot show a difference{among}, even if all of them were better; {least} could"


def pairs_needed(delta: float, spread: float) -> int | None:
    """The examples at which 80 % of studies measure a mean difference of `delta`; None if it is 0.

    Two-sided at 5 %, by the normal approximation, (z₀.₉₇₅ + z₀.₈)² spread² / delta², and never below `fewest_pairs`.

    Args:
        spread: the standard deviation of the paired differences.
    """
    if delta == 0:
        return None
    return max(fewest_pairs(), math.ceil(((Z95 + _Z80) * spread / delta) ** 2))


def least_measurable(spread: float, n: int) -> float:
    """The mean difference that 80 % of studies of `n` examples measure, by the formula of `pairs_needed`."""
    return (Z95 + _Z80) * spread / math.sqrt(n)


def honest_best(gains: Sequence[Sequence[float]], *, seed: int = 0) -> float:
    """The mean gain of the best of several systems, without the luck of being picked as such on the same examples.

    The best one is picked on a half of the examples, drawn by chance, and its gain is taken on the other half; the mean
    over 1,000 such splits. The same seed gives the same result.

    Args:
        gains: of each system, its gains on the same examples, two at least; higher is better.
    """
    table = _columns(gains)
    rng, half, found = np.random.default_rng(seed), len(table) // 2, []
    for _ in range(_SPLITS):
        order = rng.permutation(len(table))
        best = int(table[order[:half]].mean(axis=0).argmax())
        found.append(float(table[order[half:], best].mean()))
    return math.fsum(found) / _SPLITS


def _columns(table: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """(examples, systems)."""
    columns = np.asarray(table, dtype=np.float64).T
    if columns.size == 0:
        raise ValueError("no values")
    return columns


def _mean_intervals(columns: NDArray[np.float64], seed: int) -> list[Interval]:
    bounds = np.quantile(_resampled_means(columns, seed), (0.025, 0.975), axis=0)
    return [Interval(float(low), float(high)) for low, high in bounds.T]


def _resampled_means(columns: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """(RESAMPLES, systems): the means of every column over the same resamples of the examples."""
    rng, n, means = np.random.default_rng(seed), len(columns), []
    rows = max(1, _CELLS_AT_ONCE // n)
    for start in range(0, RESAMPLES, rows):
        drawn = rng.integers(0, n, size=(min(rows, RESAMPLES - start), n))
        places = drawn + n * np.arange(len(drawn))[:, None]
        counts = np.bincount(places.ravel(), minlength=drawn.size).reshape(drawn.shape)
        means.append(counts.astype(np.float64) @ columns / n)
    return np.concatenate(means)


def _sign_flip_p(differences: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """One p per column."""
    rng, n = np.random.default_rng(seed), len(differences)
    observed, rows = np.abs(differences.sum(axis=0)), max(1, _CELLS_AT_ONCE // n)
    as_extreme = np.zeros(differences.shape[1])
    for start in range(0, RESAMPLES if observed.size else 0, rows):
        signs = rng.integers(0, 2, size=(min(rows, RESAMPLES - start), n)) * 2.0 - 1.0
        as_extreme += (np.abs(signs @ differences) >= observed * (1 - 1e-12)).sum(axis=0)
    # Draws cannot show a p below 1e-4, which a correction for hundreds of systems needs; Hoeffding's bound on the
    # exact p can.
    bound = 2 * np.exp(-(observed**2) / (2 * (differences**2).sum(axis=0)))
    return np.asarray(np.minimum(bound, (as_extreme + 1) / (RESAMPLES + 1)), dtype=np.float64)
