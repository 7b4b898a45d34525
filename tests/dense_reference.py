"""Merge methods spelled out in dense float64 numpy, from their papers: the oracle, sharing no code with the product.

Each function is named as its method and takes a Case and the method's knobs.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Dense = NDArray[np.float64]


@dataclass
class Case:
    """What a method is given: factors (B, A) with the scale in B, weights, and what some methods need besides."""

    factors: list[tuple[Dense, Dense]]
    weights: list[float]
    keys: list[int] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    inputs: list[Dense] = field(default_factory=list)

    @property
    def deltas(self) -> list[Dense]:
        return [b @ a for b, a in self.factors]


def linear(case: Case) -> Dense:
    return sum((w * delta for w, delta in zip(case.weights, case.deltas, strict=True)), np.zeros_like(case.deltas[0]))


cat = linear


def ties(case: Case, density: float = 0.2, election: str = "total") -> Dense:
    deltas, weights = case.deltas, case.weights
    merged = np.zeros_like(deltas[0])
    trimmed = []
    for delta in deltas:
        k = max(1, round(density * delta.size))
        smallest_kept = np.sort(np.abs(delta), axis=None)[::-1][k - 1]
        trimmed.append(np.where(np.abs(delta) >= smallest_kept, delta, 0.0))
    for index in np.ndindex(merged.shape):
        values = [w * t[index] for w, t in zip(weights, trimmed, strict=True)]
        elected = np.sign(sum(values) if election == "total" else sum(np.sign(values)))
        agreeing = [i for i, value in enumerate(values) if value != 0 and np.sign(value) == elected]
        if agreeing:
            merged[index] = sum(values[i] for i in agreeing) / sum(abs(weights[i]) for i in agreeing)
    return merged
