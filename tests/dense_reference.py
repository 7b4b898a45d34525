"""Merge methods spelled out in dense float64 numpy, from their papers: the oracle, sharing no code with the product."""

import numpy as np
from numpy.typing import NDArray

Dense = NDArray[np.float64]


def linear(deltas: list[Dense], weights: list[float]) -> Dense:
    total = np.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        total = total + weight * delta
    return total


cat = linear


def ties(deltas: list[Dense], weights: list[float], density: float = 0.2, election: str = "total") -> Dense:
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
