"""The spectral merge methods in dense float64 numpy, from their papers: full SVDs of out × in matrices and loops."""

import numpy as np

from tests import dense_reference
from tests.dense_reference import Case, Dense

NOISE = 1e-5


def run(inside: str, deltas: list[Dense], weights: list[float], keys: list[int], **knobs: object) -> Dense:
    """The method `inside` on dense updates."""
    methods = vars(dense_reference) | globals()
    factors = [(delta, np.eye(delta.shape[1])) for delta in deltas]
    return methods[inside.replace("-", "_")](Case(factors, weights, keys=keys), **knobs)


def weighing(case: Case) -> list[tuple[Dense, float, int]]:
    keys = case.keys or [0] * len(case.weights)
    return [x for x in zip(case.deltas, case.weights, keys, strict=True) if x[1] != 0]


def triplets(delta: Dense, floor: float = 0.0) -> tuple[Dense, Dense, Dense]:
    """U, s, V down to the noise, each column of U with its largest entry positive."""
    u, s, vt = np.linalg.svd(delta)
    k = sum(1 for value in s if value > NOISE * s[0] and value > floor)
    u, s, v = u[:, :k], s[:k], vt.T[:, :k]
    turn = np.array([np.sign(u[np.argmax(np.abs(u[:, j])), j]) for j in range(k)])
    return u * turn, s, v * turn


def nearest_orthonormal(x: Dense) -> Dense:
    u, _, v = triplets(x)
    return u @ v.T


def tsv(case: Case) -> Dense:
    u, s, v = [], [], []
    for delta, weight, _ in weighing(case):
        one = triplets(delta)
        u.append(one[0])
        s.append(weight * one[1])
        v.append(one[2])
    return nearest_orthonormal(np.hstack(u)) @ np.diag(np.concatenate(s)) @ nearest_orthonormal(np.hstack(v)).T


def iso_c(case: Case) -> Dense:
    u, s, v = triplets(dense_reference.linear(case))
    return s.mean() * u @ v.T


def iso_cts(case: Case, common: float = 0.8) -> Dense:
    tasks = [(delta, weight) for delta, weight, _ in weighing(case) if np.any(delta)]
    u, s, v = triplets(dense_reference.linear(case))
    per_task = min(round((len(s) - int(common * len(s))) / len(tasks)), len(s) // len(tasks))
    shared = len(s) - per_task * len(tasks)
    us, ss, vs = [u[:, :shared]], [s[:shared]], [v[:, :shared]]
    for delta, weight in tasks:
        rest = weight * (delta - us[0] @ us[0].T @ delta)
        one = triplets(rest, floor=NOISE * abs(weight) * np.linalg.norm(delta))
        us.append(one[0][:, :per_task])
        ss.append(one[1][:per_task])
        vs.append(one[2][:, :per_task])
    return np.concatenate(ss).mean() * nearest_orthonormal(np.hstack(us)) @ nearest_orthonormal(np.hstack(vs)).T


def knots(case: Case, inside: str = "ties", **knobs: object) -> Dense:
    deltas, weights, keys = map(list, zip(*weighing(case), strict=True))
    u, s, v = triplets(np.hstack(deltas))
    aligned = np.split(np.diag(s) @ v.T, len(deltas), axis=1)
    return u @ run(inside, aligned, weights, keys, **knobs)


def balanced(delta: Dense) -> tuple[Dense, Dense]:
    """B (out, r) and A (r, in) of equal Grams."""
    u, s, v = triplets(delta)
    return u @ np.diag(np.sqrt(s)), np.diag(np.sqrt(s)) @ v.T


def core(case: Case, inside: str = "ties", **knobs: object) -> Dense:
    deltas, weights, keys = map(list, zip(*weighing(case), strict=True))
    u = triplets(np.hstack([balanced(delta)[0] for delta in deltas]))[0]
    v = triplets(np.hstack([balanced(delta)[1].T for delta in deltas]))[0]
    return u @ run(inside, [u.T @ delta @ v for delta in deltas], weights, keys, **knobs) @ v.T


def shared_subspaces(deltas: list[Dense], k: int, beta: float) -> tuple[Dense, Dense]:
    """Higher-order orthogonal iteration on the normalised updates, every step a full SVD, until nothing changes."""
    norms = [np.linalg.norm(delta) for delta in deltas]
    even = [(beta + (1 - beta) * np.mean(norms) / norm) * delta for delta, norm in zip(deltas, norms, strict=True)]

    # As many directions as there are on either side, however few the other has.
    most_u, most_v = (triplets(np.hstack(side))[0].shape[1] for side in (even, [delta.T for delta in even]))

    def leading(matrices: list[Dense], most: int) -> Dense:
        return np.linalg.svd(np.hstack(matrices))[0][:, : min(k, most)]

    u, v = leading(even, most_u), leading([delta.T for delta in even], most_v)
    kept = 0.0
    for _ in range(5000):
        u = leading([delta @ v for delta in even], most_u)
        v = leading([delta.T @ u for delta in even], most_v)
        before, kept = kept, sum(np.linalg.norm(u.T @ delta @ v) ** 2 for delta in even)
        if kept - before <= 1e-14 * kept:
            break
    return leading([delta @ v for delta in even], most_u), v


def ctm(case: Case, inside: str = "ties", compress_to: int = 16, beta: float = 0.25, **knobs: object) -> Dense:
    deltas, weights, keys = map(list, zip(*weighing(case), strict=True))
    u, v = shared_subspaces(deltas, compress_to, beta)
    return u @ run(inside, [u.T @ delta @ v for delta in deltas], weights, keys, **knobs) @ v.T


def pico(case: Case, inside: str = "linear", **knobs: object) -> Dense:
    deltas, weights, keys = map(list, zip(*weighing(case), strict=True))
    pairs = [balanced(delta) for delta in deltas]
    u, s, _ = triplets(np.hstack([b for b, _ in pairs]))
    moving = sum(bool(delta.any()) for delta in deltas)
    calmed = []
    for b, a in pairs:
        change = np.zeros_like(b)
        for j, energy in enumerate(s**2 / sum(s**2)):
            change += (1 / (1 + (moving - 1) * energy) - 1) * np.outer(u[:, j], u[:, j]) @ b
        calmed.append((b + change) @ a)
    merged = run(inside, calmed, weights, keys, **knobs)
    target = np.average([np.linalg.norm(delta) for delta in deltas], weights=np.abs(weights))
    return merged * target / np.linalg.norm(merged)


def orthogonal(case: Case, share: float = 0.5) -> Dense:
    out, inn = case.deltas[0].shape
    total = np.zeros((out, inn))
    for delta, weight in zip(case.deltas, case.weights, strict=True):
        left, right = np.eye(out), np.eye(inn)
        if total.any():
            u, s, v = triplets(total)
            taken = 0
            while sum(s[:taken]) < share * sum(s) * (1 - 1e-12):
                taken += 1
            for j in range(taken):
                left -= np.outer(u[:, j], u[:, j])
                right -= np.outer(v[:, j], v[:, j])
        total = total + weight * left @ delta @ right
    return total
