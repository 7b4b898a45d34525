"""Sums over the entries of two dense updates, of which no more than a block of rows is formed."""

from collections.abc import Callable

import torch
from torch import Tensor

from lora_cli.algebra.lowrank import LowRank, inner

# Two tiles of fp32 of this many entries fit a core's cache.
_TILE = 1 << 17
# Measured: a multiplication among float64 factors of squares takes as long as four that make a tile of fp32.
_DEARER = 4


def absolute(x: LowRank, y: LowRank) -> float:
    """Σ |x_e y_e| over the entries e of two updates (out, in), at O(out · in (r_x + r_y)): no factors give it."""
    return _over_tiles(x, y, Tensor.abs_)


def agreeing(x: LowRank, y: LowRank) -> float:
    """Σ max(x_e y_e, 0) over the entries e of two updates (out, in), at the cost of `absolute`."""
    return _over_tiles(x, y, lambda products: products.clamp_(min=0))


def squares(x: LowRank, y: LowRank) -> float:
    """Σ x_e² y_e² over the entries e of two updates (out, in).

    The entrywise square of B A is a product of factors of rank s = r(r + 1)/2: the products b_j b_k and a_j a_k of all
    pairs j ≤ k, those of j < k counted twice. The sum is the inner product of two such: O(s_x s_y (out + in)). Where
    the ranks make this dearer than the dense entries, it goes through tiles.
    """
    out_features, in_features = x.shape
    pairs = [r * (r + 1) // 2 for r in (x.rank, y.rank)]
    if _DEARER * pairs[0] * pairs[1] * (out_features + in_features) < out_features * in_features * (x.rank + y.rank):
        squared = _squared(x)
        return float(inner(squared, squared if x is y else _squared(y)))
    return _over_tiles(x, y, Tensor.square_, power=2)


def _squared(update: LowRank) -> LowRank:
    """The entrywise square as factors of rank r(r + 1)/2, float64."""
    j, k = torch.triu_indices(update.rank, update.rank, device=update.B.device)
    b, a = update.B.double(), update.A.double()
    return LowRank(b[:, j] * b[:, k] * torch.where(j == k, 1.0, 2.0).double(), a[j] * a[k])


def _over_tiles(x: LowRank, y: LowRank, change: Callable[[Tensor], Tensor], power: int = 1) -> float:
    """Σ `change`(x_e y_e), of a `change` that takes a factor out of its argument to the `power`."""
    sizes = float(x.norm()), float(y.norm())
    if not all(sizes):
        return 0.0
    # Products of tiny updates would be lost in fp32.
    one, other = (LowRank((u.B.double() / size).to(u.B.dtype), u.A) for u, size in zip((x, y), sizes, strict=True))
    height = max(1, _TILE // x.shape[1])
    total = 0.0
    for start in range(0, x.shape[0], height):
        rows = slice(start, start + height)
        tile = one.B[rows] @ one.A
        total += float(change(tile.mul_(tile if x is y else other.B[rows] @ other.A)).sum())
    return total * (sizes[0] * sizes[1]) ** power
