"""SLERP: along the great circle between two adapters."""

from typing import Annotated, Literal

import torch
from torch import Tensor

from lora_cli.algebra.updates import Updates
from lora_cli.errors import Refused
from lora_cli.methods import Knob, method

# Past this angle, 178 degrees, coefficients exceed 30, and the shortest great circle is not unique.
_OPPOSITE = -0.9995


@method("coefficients")
def slerp(
    updates: Updates,
    weights: Tensor,
    *,
    per: Annotated[Literal["module", "adapter"], Knob("measure per module or over the whole adapter")] = "module",
) -> Tensor:
    """Spherical interpolation between two adapters.

    ΔW = s Σ sin(p_i θ) / sin θ · sgn(w_i) ΔW_i with s = |w_0| + |w_1|, p_i = |w_i| / s and θ the angle between
    sgn(w_0) ΔW_0 and sgn(w_1) ΔW_1. As θ → 0 this becomes Σ w_i ΔW_i, also the result for a zero update. More
    than two adapters are refused, and so are updates within 2 degrees of opposite unless a weight is 0. In a module
    that one of the adapters lacks, its update counts as zero.
    With --per adapter norms and cosines are those of the whole updates, and all modules get the same c.

    Weights: the place on the arc, whatever the order of the adapters: A=0.7 B=0.3 is at 0.3 of the way from A to B, the
    default half way. There is no --t, because it would depend on the order. A negative weight flips the update's sign;
    weights that do not sum to 1 scale the result.

    Cost: O(R² (out + in)) for three inner products.

    Use: for two adapters of like norm. Half way, orthogonal ones give √½ of their sum, 1.4 times the mean, which is
    their own norm. Where norms differ, the result's norm may leave the range between them: karcher walks the same arc
    at the mean norm.

    Source: Shoemake 1985, and mergekit's slerp on updates in place of whole weights, whose angles are so small that it
    interpolates them linearly. mergekit interpolates linearly where |cos θ| > 0.9995, a jump of up to 1e-4 in the
    coefficients; this method does so only within rounding, and refuses opposite updates. For an update of zero mergekit
    sets θ to 90 degrees. Negative weights are ours.
    """
    if len(weights) > 2:
        raise Refused(
            f"slerp and nuslerp merge two adapters, not {len(weights)}",
            hint="use --method multislerp, karcher or norm-matched, which take any number",
        )
    if len(weights) == 1:
        return weights
    products = updates.gram(per)
    if weights.all() and cosine(weights, products.diagonal(), products[0, 1]) < _OPPOSITE:
        raise Refused(
            "the two updates point in opposite directions: the great circle between them is not unique",
            hint="use --method linear, or --per adapter if this is so in one module only",
        )
    return on_arc(weights, products.diagonal(), products[0, 1])


def cosine(weights: Tensor, squares: Tensor, dots: Tensor) -> Tensor:
    """Cosines of sgn(w_0) x and sgn(w_1) y by their squared norms (2, …) and products x·y (…); 1 where one is zero."""
    norms = squares.clamp(min=0).sqrt().prod(0)
    quotient = weights.sign().prod() * dots / torch.where(norms > 0, norms, 1)
    return torch.where(norms > 0, quotient.clamp(-1, 1), 1)


def on_arc(weights: Tensor, squares: Tensor, dots: Tensor) -> Tensor:
    """Coefficients (2, …) of pairs of vectors; nearly opposite pairs are interpolated linearly.

    Args:
        weights: (2,).
        squares: squared norms, (2, …).
        dots: inner products, (…).
    """
    cosines = cosine(weights, squares, dots)
    line = weights.view(2, *[1] * cosines.ndim).expand(2, *cosines.shape)
    total = line.abs().sum(0)
    straight = (cosines > 1 - 1e-12) | (cosines < _OPPOSITE) | (total == 0)
    angles = torch.arccos(torch.where(straight, 0, cosines))
    arc = total * line.sign() * torch.sin(line.abs() / torch.where(total > 0, total, 1) * angles) / torch.sin(angles)
    return torch.where(straight, line, arc)
