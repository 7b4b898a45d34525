"""Merges that only weigh the updates, on dense vectors in float64 numpy, angles by arccos and loops throughout.

`RULES` has, by method, what turns vectors (n, numbers) and weights into the merged vector; a vector may be a module or
all modules of an adapter side by side. The other functions are named as their methods and take a Case.
"""

from collections.abc import Callable, Sequence

import numpy as np

from tests.dense_reference import Case, Dense

Rule = Callable[[Sequence[Dense], Sequence[float]], Dense]


def _norm(x: Dense) -> float:
    return float(np.sqrt((x * x).sum()))


def _angle(x: Dense, y: Dense) -> float:
    return float(np.arccos(np.clip((x * y).sum() / (_norm(x) * _norm(y)), -1, 1)))


def _turned(vectors: Sequence[Dense], weights: Sequence[float]) -> list[tuple[Dense, float]]:
    """Unit vectors, turned by the signs of the weights, and shares that add up to 1."""
    moving = [(x, w) for x, w in zip(vectors, weights, strict=True) if x.any() and w]
    total = sum(abs(w) for _, w in moving)
    return [(np.sign(w) * x / _norm(x), abs(w) / total) for x, w in moving]


def _length(vectors: Sequence[Dense], weights: Sequence[float]) -> float:
    return sum(abs(w) * _norm(x) for x, w in zip(vectors, weights, strict=True))


def _sum(vectors: Sequence[Dense], weights: Sequence[float]) -> Dense:
    return np.sum([w * x for x, w in zip(vectors, weights, strict=True)], axis=0)


def _norm_matched(vectors: Sequence[Dense], weights: Sequence[float]) -> Dense:
    mean = _sum(vectors, weights)
    as_if_orthogonal = np.sqrt(sum((w * _norm(x)) ** 2 for x, w in zip(vectors, weights, strict=True)))
    return mean * _length(vectors, weights) / max(_norm(mean), as_if_orthogonal)


def _multislerp(vectors: Sequence[Dense], weights: Sequence[float]) -> Dense:
    units = _turned(vectors, weights)
    mean = sum(p * u for u, p in units)
    mean = mean / _norm(mean)
    tangent = sum(p * (u - (u * mean).sum() * mean) for u, p in units)
    far = _norm(tangent)
    moved = mean * np.cos(far) + (tangent * np.sin(far) / far if far else 0)
    return _length(vectors, weights) * moved


def _karcher(vectors: Sequence[Dense], weights: Sequence[float]) -> Dense:
    units = _turned(vectors, weights)
    mean = sum(p * u for u, p in units)
    mean = mean / _norm(mean)
    for _ in range(20000):
        tangent = np.zeros_like(mean)
        for u, p in units:
            if (theta := _angle(u, mean)) > 1e-7:
                tangent += p * theta / np.sin(theta) * (u - np.cos(theta) * mean)
        far = _norm(tangent)
        if far < 1e-13:
            break
        mean = np.cos(far) * mean + np.sin(far) * tangent / far
        mean = mean / _norm(mean)
    return _length(vectors, weights) * mean


def _model_stock(vectors: Sequence[Dense], weights: Sequence[float]) -> Dense:
    units = _turned(vectors, weights)
    if len(units) < 2:
        return _sum(vectors, weights)
    pairs = [(p * q, np.cos(_angle(u, v))) for i, (u, p) in enumerate(units) for v, q in units[i + 1 :]]
    cosine = sum(share * c for share, c in pairs) / sum(share for share, _ in pairs)
    n = 1 / sum(p * p for _, p in units)
    return min(1.0, max(0.0, n * cosine / (1 + (n - 1) * cosine))) * _sum(vectors, weights)


def _slerp(vectors: Sequence[Dense], weights: Sequence[float]) -> Dense:
    if len(vectors) < 2 or not all(x.any() for x in vectors) or not all(weights):
        return _sum(vectors, weights)
    x, y = (np.sign(w) * v for v, w in zip(vectors, weights, strict=True))
    theta, total = _angle(x, y), sum(map(abs, weights))
    if np.sin(theta) < 1e-6:
        return _sum(vectors, weights)
    t = abs(weights[1]) / total
    return total * (np.sin((1 - t) * theta) * x + np.sin(t * theta) * y) / np.sin(theta)


RULES: dict[str, Rule] = {
    "karcher": _karcher,
    "model-stock": _model_stock,
    "multislerp": _multislerp,
    "norm-matched": _norm_matched,
    "slerp": _slerp,
}


def _by_module(name: str) -> Callable[[Case], Dense]:
    return lambda case: RULES[name](case.deltas, case.weights)


karcher = _by_module("karcher")
model_stock = _by_module("model-stock")
multislerp = _by_module("multislerp")
norm_matched = _by_module("norm-matched")
slerp = _by_module("slerp")


def nuslerp(case: Case, angles: str = "whole") -> Dense:
    deltas = case.deltas
    if angles == "whole":
        return slerp(case)
    if angles == "column":
        return np.array([_slerp(columns, case.weights) for columns in zip(*(d.T for d in deltas), strict=True)]).T
    return np.array([_slerp(rows, case.weights) for rows in zip(*deltas, strict=True)])
