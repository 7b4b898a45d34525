"""The measures of continual learning, from the scores a[i][j] on task j after learning task i."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

Matrix = Sequence[Sequence[float]]
"""a[i][j], the score on task j after learning task i: (T, T), both in the order of the sequence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Continual:
    """How well T tasks were learnt one after another; more is better, but for `forgetting`.

    final: the average final score, mean_j a[T][j].
    forgetting: the best that was ever lost, 1/(T-1) Σ_{j<T} (max_{i<T} a[i][j] - a[T][j]).
    backward_transfer: what later tasks did to earlier ones, 1/(T-1) Σ_{j<T} (a[T][j] - a[j][j]).
    backward_transfer_by_t: the same sum divided by T, as SAPT's scorer prints it.
    forward_transfer: what earlier tasks did to later ones, mean_i a[i][i] - mean_i of the LoRA of task i alone.
    """

    final: float
    forgetting: float
    backward_transfer: float
    backward_transfer_by_t: float
    forward_transfer: float


def continual(a: Matrix, alone: Sequence[float], *, better: str = "higher") -> Continual:
    """The measures of one run.

    Args:
        a: (T, T), T at least 2.
        alone: (T,), the score on each task of a LoRA trained on this task alone.
        better: "lower" for a score such as a loss. All signs but that of `final` then turn, so that forgetting is
            positive where something was lost, and transfer where something was won.

    Raises ValueError for fewer than two tasks, or another shape.

    Source: backward transfer by Lopez-Paz and Ranzato 2017, arXiv 1706.08840, who divide by T - 1; forgetting by
    Chaudhry et al. 2018, arXiv 1801.10112; all of them, and forward transfer, as the scorer of SAPT, Zhao et al. 2024,
    arXiv 2401.08295, computes them.
    """
    last = len(a) - 1
    if last < 1 or len(alone) != len(a) or any(len(row) != len(a) for row in a):
        raise ValueError("a sequence has T x T scores and T scores alone, for T of at least 2")
    sign = -1.0 if better == "lower" else 1.0
    lost = math.fsum(max(sign * row[j] for row in a[:last]) - sign * a[last][j] for j in range(last))
    won = math.fsum(sign * (a[last][j] - a[j][j]) for j in range(last))
    return Continual(
        final=mean(a[last]),
        forgetting=lost / last,
        backward_transfer=won / last,
        backward_transfer_by_t=won / len(a),
        forward_transfer=sign * (mean([a[i][i] for i in range(len(a))]) - mean(alone)),
    )


def mean_matrix(runs: Sequence[Matrix]) -> list[list[float]]:
    """The mean of several runs, entry by entry."""
    return [[mean([run[i][j] for run in runs]) for j in range(len(row))] for i, row in enumerate(runs[0])]


def mean(values: Sequence[float]) -> float:
    """The mean, summed without loss."""
    return math.fsum(values) / len(values)
