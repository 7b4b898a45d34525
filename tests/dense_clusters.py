"""LoRA-LEGO, WUDI and RegMean in dense float64 numpy; see tests/dense_reference.py.

k-means here runs on whole points, start by start, and forms every distance from their differences. The numbers that
decide its first centroids are the product's own: on random adapters other starts end in other clusterings.
"""

import numpy as np

from lora_cli.algebra.draws import uniform
from tests.dense_reference import Case, Dense


def wudi(case: Case, ridge: float = 1e-4) -> Dense:
    """The normal equations in (in, in), with each Gram and the pull towards the mean spelled out."""
    weights = np.array(case.weights)
    features = case.deltas[0].shape[1]
    rho = ridge * (weights**2).sum() / np.abs(weights).sum()
    mean = sum(abs(w) * w * d for w, d in zip(weights, case.deltas, strict=True)) / np.abs(weights).sum()
    left, right = rho * np.eye(features), rho * mean
    for w, delta in zip(weights, case.deltas, strict=True):
        h = abs(w) * delta.T @ delta / np.linalg.norm(delta) ** 2
        left, right = left + h, right + w * delta @ h
    return np.linalg.lstsq(left, right.T, rcond=None)[0].T


def regmean(case: Case, alpha: float = 0.9) -> Dense:
    """Whole Gram matrices and an inverse."""
    total = sum(abs(w) for w in case.weights)
    features = case.deltas[0].shape[1]
    grams = [abs(w) / total * x.T @ x / len(x) for w, x in zip(case.weights, case.inputs, strict=True)]
    floor = 1e-6 * float(sum(np.trace(g) for g in grams)) / features
    numerator, denominator = np.zeros_like(case.deltas[0]), np.zeros((features, features))
    for w, delta, gram in zip(case.weights, case.deltas, grams, strict=True):
        shrunk = alpha * gram + (1 - alpha) * np.diag(np.diag(gram)) + floor * abs(w) / total * np.eye(features)
        numerator += np.sign(w) * delta @ shrunk
        denominator += shrunk
    return numerator @ np.linalg.inv(denominator)


def lego(case: Case, clusters: int = 0, gauge: str = "svd", seed: int = 0) -> Dense:
    cut = [
        [np.concatenate([x, np.sign(w) * y]) for x, y in _ranks_of(b, a, s, gauge)]
        for (b, a), s, w in zip(case.factors, case.scales, case.weights, strict=True)
    ]
    mean_rank = sum(len(points) for points in cut) / len(cut)
    k = clusters or round(mean_rank)
    x = np.array([point for points in cut for point in points])
    u = np.array([abs(w) for points, w in zip(cut, case.weights, strict=True) for _ in points])
    races = [
        uniform(seed, key, 0, 10 * k * len(points)).double().numpy().reshape(10, k, len(points))
        for points, key in zip(cut, case.keys, strict=True)
    ]
    runs = [_lloyd(x, u, _first(x, u, start, gauge == "svd"), gauge == "svd") for start in np.concatenate(races, 2)]
    best = min(squares for _, _, squares in runs)
    labels, turned, _ = next(run for run in runs if run[2] <= best * (1 + 1e-8))
    features = case.deltas[0].shape[1]
    merged = np.zeros_like(case.deltas[0])
    for c in set(labels):
        inside = labels == c
        centroid = (u[inside, None] * turned[inside]).sum(0) / u[inside].sum()
        grown = (u[inside] * np.abs(x[inside]).max(1)).sum() / u[inside].sum() / np.abs(centroid).max()
        merged += grown**2 * np.outer(centroid[features:], centroid[:features])
    return np.sqrt(mean_rank / len(set(labels))) * merged


def _ranks_of(b: Dense, a: Dense, scale: float, gauge: str) -> list[tuple[Dense, Dense]]:
    if gauge == "raw":
        unscaled = b / scale
        return [(np.sqrt(scale) * x, np.sqrt(scale) * y) for x, y in zip(a, unscaled.T, strict=True)]
    if gauge == "balanced":
        ratios = [np.sqrt(np.linalg.norm(y) / np.linalg.norm(x)) for x, y in zip(a, b.T, strict=True)]
        return [(x * q, y / q) for x, y, q in zip(a, b.T, ratios, strict=True)]
    u, s, vh = np.linalg.svd(b @ a)
    pairs = []
    for j in range(int((s > 1e-10 * s[0]).sum())):
        sign = np.sign(u[np.abs(u[:, j]).argmax(), j])
        pairs.append((sign * np.sqrt(s[j]) * vh[j], sign * np.sqrt(s[j]) * u[:, j]))
    return pairs


def _squares(x: Dense, centroids: Dense, aligned: bool) -> Dense:
    """Squared distances (points, k), the nearer of a point and its opposite where they are aligned."""
    apart = ((x[:, None] - centroids[None]) ** 2).sum(2)
    return np.minimum(apart, ((x[:, None] + centroids[None]) ** 2).sum(2)) if aligned else apart


def _first(x: Dense, u: Dense, races: Dense, aligned: bool) -> Dense:
    """k-means++: the point whose exponential waiting time, of rate weight × squared distance, ends first."""
    chosen: list[int] = []
    for race in races:
        rates = u * (_squares(x, x[chosen], aligned).min(1) if chosen else 1)
        with np.errstate(divide="ignore"):
            chosen.append(int((-np.log(1 - race) / rates).argmin()))
    return x[chosen]


def _lloyd(x: Dense, u: Dense, centroids: Dense, aligned: bool) -> tuple[Dense, Dense, float]:
    """Labels, the points as they are turned, and the weighted sum of squares."""
    while True:
        squares = _squares(x, centroids, aligned)
        labels, nearest = squares.argmin(1), squares.min(1)
        total = float(u @ nearest)
        for c in set(range(len(centroids))) - set(labels):
            labels[nearest.argmax()] = c
            nearest[nearest.argmax()] = 0
        own = centroids[labels]
        limits = -1e-6 * np.linalg.norm(x, axis=1) * np.linalg.norm(own, axis=1)
        turned = np.where(aligned & ((x * own).sum(1) < limits)[:, None], -x, x)
        moved = np.array(
            [(u[labels == c, None] * turned[labels == c]).sum(0) / u[labels == c].sum() for c in range(len(centroids))]
        )
        if np.allclose(moved, centroids, rtol=0, atol=1e-12):
            return labels, turned, total
        centroids = moved
