"""Merge methods spelled out in dense float64 numpy, from their papers: the oracle, sharing no code with the product.

Each function is named as its method and takes a Case and the method's knobs.
"""

import hashlib
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


def ties(case: Case, density: float = 0.2, election: str = "total", per: str = "module") -> Dense:
    return disjoint_mean([largest_entries(delta, density) for delta in case.deltas], case.weights, election)


def dare(case: Case, density: float = 0.5, seed: int = 0) -> Dense:
    dropped = randomly_dropped(case, density, seed)
    return sum((w * d for w, d in zip(case.weights, dropped, strict=True)), np.zeros_like(dropped[0]))


def dare_ties(case: Case, density: float = 0.5, election: str = "total", seed: int = 0) -> Dense:
    return disjoint_mean(randomly_dropped(case, density, seed), case.weights, election)


def della(case: Case, density: float = 0.5, epsilon: float = 0.1, election: str = "total", seed: int = 0) -> Dense:
    dropped = []
    for delta, key in zip(case.deltas, case.keys, strict=True):
        sizes = np.abs(delta)
        smaller = (sizes[:, None, :] < sizes[:, :, None]).sum(2)
        equal = (sizes[:, None, :] == sizes[:, :, None]).sum(2) - 1
        chance = density - epsilon + 2 * epsilon * (smaller + equal / 2) / (delta.shape[1] - 1)
        drawn = draws(seed, key, delta.size).reshape(delta.shape)
        dropped.append(np.where(drawn < chance, delta / chance, 0.0))
    return disjoint_mean(dropped, case.weights, election)


def breadcrumbs(case: Case, density: float = 0.2, gamma: float = 0.01, per: str = "module") -> Dense:
    merged = np.zeros_like(case.deltas[0])
    top = min(gamma, 1 - density)
    for weight, delta in zip(case.weights, case.deltas, strict=True):
        kept = largest_entries(delta, density + top)
        if top > 0:
            kept[largest_entries(delta, top) != 0] = 0.0
        merged += weight * kept
    return merged


def sce(case: Case, density: float = 0.5) -> Dense:
    scaled = np.stack([w * delta for w, delta in zip(case.weights, case.deltas, strict=True) if w])
    variance = scaled.var(axis=0)
    scaled *= variance >= np.sort(variance, axis=None)[::-1][max(1, round(density * variance.size)) - 1]
    energies = (scaled**2).sum(axis=(1, 2))[:, None, None]
    agree = (np.sign(scaled) == np.sign(scaled.sum(0))) & (scaled != 0)
    share = (energies * agree).sum(0)
    return (energies * scaled * agree).sum(0) / np.where(share == 0, 1.0, share)


def rank_dare(case: Case, density: float = 0.5, seed: int = 0) -> Dense:
    merged = np.zeros_like(case.deltas[0])
    for weight, delta, key in zip(case.weights, case.deltas, case.keys, strict=True):
        u, s, vh = np.linalg.svd(delta, full_matrices=False)
        merged += weight / density * (u * (s * (draws(seed, key, len(s)) < density))) @ vh
    return merged


def largest_entries(delta: Dense, density: float) -> Dense:
    k = max(1, round(density * delta.size))
    smallest_kept = np.sort(np.abs(delta), axis=None)[::-1][k - 1]
    return np.where(np.abs(delta) >= smallest_kept, delta, 0.0)


def disjoint_mean(kept: list[Dense], weights: list[float], election: str) -> Dense:
    merged = np.zeros_like(kept[0])
    for index in np.ndindex(merged.shape):
        values = [w * t[index] for w, t in zip(weights, kept, strict=True)]
        elected = np.sign(sum(values) if election == "total" else sum(np.sign(values)))
        agreeing = [i for i, value in enumerate(values) if value != 0 and np.sign(value) == elected]
        if agreeing:
            merged[index] = sum(values[i] for i in agreeing) / sum(abs(weights[i]) for i in agreeing)
    return merged


def randomly_dropped(case: Case, density: float, seed: int) -> list[Dense]:
    drawn = [
        draws(seed, key, delta.size).reshape(delta.shape) for key, delta in zip(case.keys, case.deltas, strict=True)
    ]
    return [np.where(d < density, delta / density, 0.0) for d, delta in zip(drawn, case.deltas, strict=True)]


def draws(seed: int, key: int, count: int) -> Dense:
    """The generator of algebra/draws.py in Python's own integers."""
    digest = hashlib.sha256(f"{seed}\n{key}".encode()).digest()
    first, second = (int.from_bytes(digest[i : i + 4], "little") for i in (0, 4))
    return np.array([(lowbias32(lowbias32(place ^ first) ^ second) >> 8) / 2**24 for place in range(count)])


def lowbias32(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ (x >> 16)
