"""The selection methods that read weights, written anew on dense float64 updates."""

from collections.abc import Callable, Mapping
from math import log, pi, sqrt

import torch
from torch import Tensor

Dense = Mapping[str, Tensor]  # module → ΔW (out, in), float64


def flat(one: Dense, other: Dense) -> tuple[Tensor, Tensor]:
    """All entries of both in one vector each, zeros for a module that one of them lacks."""
    modules = sorted({*one, *other})
    shapes = {name: (one if name in one else other)[name].shape for name in modules}
    x, y = (
        torch.cat([update.get(name, torch.zeros(shapes[name], dtype=torch.float64)).flatten() for name in modules])
        for update in (one, other)
    )
    return x, y


def over_norms(total: float, x: Tensor, y: Tensor) -> float:
    return total / sqrt(float(x @ x) * float(y @ y))


def cosine(one: Dense, other: Dense) -> float:
    x, y = flat(one, other)
    return over_norms(float(x @ y), x, y)


def cosine_module(one: Dense, other: Dense) -> float:
    both = [name for name in one if name in other and one[name].any() and other[name].any()]
    return sum(cosine({name: one[name]}, {name: other[name]}) for name in both) / len({*one, *other})


def clamp(one: Dense, other: Dense) -> float:
    x, y = flat(one, other)
    products = x * y
    return over_norms(float(products[products > 0].sum()), x, y)


def clamp_pm(one: Dense, other: Dense) -> float:
    sums = [float((one[name] * other[name]).sum()) for name in one if name in other]
    return over_norms(sum(total for total in sums if total > 0), *flat(one, other))


def absolute(one: Dense, other: Dense) -> float:
    x, y = flat(one, other)
    return over_norms(float(x.abs() @ y.abs()), x, y)


def quasi_fim(one: Dense, other: Dense) -> float:
    x, y = (entries**2 for entries in flat(one, other))
    return sqrt(over_norms(float(x @ y), x, y))


def l2(one: Dense, other: Dense) -> float:
    x, y = flat(one, other)
    return -log(1 + float((x - y) @ (x - y)))


ORACLES: dict[str, Callable[[Dense, Dense], float]] = {
    "abs": absolute,
    "clamp": clamp,
    "clamp-pm": clamp_pm,
    "cosine": cosine,
    "cosine-module": cosine_module,
    "l2": l2,
    "quasi-fim": quasi_fim,
}
UNRELATED = {
    "abs": 2 / pi,
    "clamp": 1 / pi,
    "cosine": 0.0,
    "cosine-module": 0.0,
    "clamp-pm": 0.0,
    "quasi-fim": 1 / sqrt(3),
}
"""The expected scores of independent Gaussian updates of full rank, of many entries."""
