"""What PEFT's combination types do to A and B apart, spelled out in float64 numpy entry by entry.

Each function is named as its method and takes a Case and the method's knobs; random entries come from the product's
own numbers, since which ones fall is no part of the formula.
"""

import numpy as np

from lora_cli.algebra.draws import uniform
from tests.dense_reference import Case, Dense

Side = list[Dense]


def peft_linear(case: Case) -> Dense:
    b, a = _raw(case)
    return _product(_sum, case, b, a)


def peft_magnitude_prune(case: Case, density: float = 0.2) -> Dense:
    b, a = _raw(case)
    return _product(_sum, case, [_trim(x, density) for x in b], [_trim(x, density) for x in a])


def peft_ties(case: Case, density: float = 0.2, election: str = "total") -> Dense:
    b, a = _raw(case)
    elect = _elect_by(election)
    return _product(elect, case, [_trim(x, density) for x in b], [_trim(x, density) for x in a])


def peft_dare_linear(case: Case, density: float = 0.2, seed: int = 0) -> Dense:
    return _product(_sum, case, *_drop(case, density, seed))


def peft_dare_ties(case: Case, density: float = 0.2, election: str = "total", seed: int = 0) -> Dense:
    return _product(_elect_by(election), case, *_drop(case, density, seed))


def _raw(case: Case) -> tuple[Side, Side]:
    return [b / s for (b, _), s in zip(case.factors, case.scales, strict=True)], [a for _, a in case.factors]


def _product(combine, case: Case, b: Side, a: Side) -> Dense:
    strengths = [w * s for w, s in zip(case.weights, case.scales, strict=True)]
    roots = [abs(v) ** 0.5 for v in strengths]
    signed = [-root if v < 0 else root for root, v in zip(roots, strengths, strict=True)]
    return combine(b, roots) @ combine(a, signed)


def _sum(side: Side, weights: list[float]) -> Dense:
    total = np.zeros_like(side[0])
    for x, w in zip(side, weights, strict=True):
        total += w * x
    return total


def _elect_by(election: str):
    def elect(side: Side, weights: list[float]) -> Dense:
        merged = np.zeros_like(side[0])
        for place in np.ndindex(merged.shape):
            values = [x[place] for x in side]
            vote = sum(values) if election == "total" else sum(np.sign(v) for v in values)
            agreeing = [w * v for v, w in zip(values, weights, strict=True) if (v > 0 if vote >= 0 else v < 0)]
            if agreeing:
                merged[place] = sum(agreeing) / len(agreeing)
        return merged

    return elect


def _trim(x: Dense, density: float) -> Dense:
    kept = np.zeros_like(x)
    for flat in np.argsort(-np.abs(x), axis=None)[: int(density * x.size)]:
        kept.flat[flat] = x.flat[flat]
    return kept


def _drop(case: Case, density: float, seed: int) -> tuple[Side, Side]:
    b, a = _raw(case)
    for i, key in enumerate(case.keys):
        numbers = uniform(seed, key, 0, a[i].size + b[i].size).numpy()
        a[i] = np.where(numbers[: a[i].size].reshape(a[i].shape) < density, a[i] / density, 0)
        b[i] = np.where(numbers[a[i].size :].reshape(b[i].shape) < density, b[i] / density, 0)
    return b, a
