"""Inner loops of the work done element by element: compiled by numba on a CPU, the same formulas in torch elsewhere.

Callers need not know which of the two runs. Both count, elect and draw the same, sums of floats differ by rounding; the
compiled ones are several times faster.
"""

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]

COMPILED = True
"""Whether CPU tensors go through numba. Tests turn it off to compare the two."""

_PIECE = 1 << 14
_MASK = 0xFFFFFFFF


def tally(tile: Tensor, low: float, high: float) -> tuple[int, Tensor]:
    """The number of magnitudes of `tile` above `high`, and the magnitudes in (low, high]."""
    magnitudes = tile.abs()
    over = magnitudes > high
    return int(over.sum()), magnitudes[(magnitudes > low) & ~over]


def largest(magnitudes: Tensor, k: int) -> float:
    """The k-th largest of a vector's entries, 1 ≤ k ≤ size."""
    return ordered(magnitudes, [magnitudes.numel() - k])[0]


def ordered(values: Tensor, places: Sequence[int]) -> list[float]:
    """The entries at some places, from 0, of a vector in ascending order."""
    if compiles(values):
        found: list[float] = np.partition(values.numpy(), places)[list(places)].tolist()
        return found
    return [float(torch.kthvalue(values, place + 1).values) for place in places]


def sums_of(tile: Tensor) -> int:
    """How many numbers `cast` needs for the four sums of a tile."""
    spot = loops().SPOT if compiles(tile) else 1
    return 4 * spot * math.ceil(tile.numel() / spot)


def cast(tile: Tensor, weight: float, cut: float, sums: Tensor) -> None:
    """Add weight · tile, where |tile| reaches `cut`, to one sum where positive and to another where negative.

    |weight| is added to two further sums at the same places.

    sums: `sums_of` the tile numbers, zero before the first cast; only `elected` knows their order.
    """
    if compiles(tile):
        scalar = tile.numpy().dtype.type
        loops().cast(_flat(tile), scalar(weight), scalar(abs(weight)), scalar(cut), sums.numpy())
        return
    plus, minus, agreed, against = sums.view(4, *tile.shape)
    kept = torch.where(tile.abs() >= cut, tile * weight, 0)
    plus.add_(kept.clamp(min=0))
    minus.add_(kept.clamp(max=0))
    agreed.add_(kept > 0, alpha=abs(weight))
    against.add_(kept < 0, alpha=abs(weight))


def vote(tile: Tensor, cut: float, sign: int | None, votes: Tensor) -> None:
    """Add tile to `votes` where |tile| reaches `cut`, or, given the sign of a weight, sign · sgn(tile)."""
    if compiles(tile):
        scalar = tile.numpy().dtype.type
        loops().vote(_flat(tile), scalar(cut), sign is not None, scalar(sign or 0), _flat(votes))
        return
    kept = tile * (tile.abs() >= cut).to(tile.dtype)
    votes.add_(kept if sign is None else kept.sign_().mul_(sign))


def elected(sums: Tensor, votes: Tensor, total: bool) -> Tensor:
    """Of what was cast the mean of the sign that `votes` have, 0 where they are 0 and where nobody has it; in `votes`.

    total: the votes are the sum of all that was cast, whatever they hold.
    """
    if compiles(votes):
        loops().elected(sums.numpy(), _flat(votes), total)
        return votes
    plus, minus, agreed, against = sums.view(4, *votes.shape)
    if total:
        torch.add(plus, minus, out=votes)
    won = torch.where(votes > 0, plus, minus).masked_fill_(votes == 0, 0)
    share = torch.where(votes > 0, agreed, against)
    return votes.copy_(won.div_(share.masked_fill_(share == 0, 1)))


def squares(values: Tensor) -> float:
    """Sum of the squares of all entries, in float64."""
    if compiles(values):
        rows = values.T if values.T.is_contiguous() else values.contiguous()
        return float(loops().squares(_flat(rows), np.zeros(loops().GROUP)))
    return float(sum(rows.double().square().sum() for rows in torch.split(values, _PIECE // 16)))


def mean_ranks(tile: Tensor) -> Tensor:
    """Place of every magnitude among those of its row, from 0 (smallest) to 1; equal ones share the mean of theirs.

    (rows, n) → (rows, n), in the dtype of `tile`. A row of one entry has the place ½.
    """
    magnitudes = tile.abs()
    if compiles(tile):
        rows = magnitudes.numpy()
        ranks = np.empty_like(rows)
        loops().mean_ranks(rows, np.argsort(rows, axis=1), ranks)
        return torch.from_numpy(ranks)
    ordered = magnitudes.sort(dim=1).values
    before = torch.searchsorted(ordered, magnitudes)
    up_to = torch.searchsorted(ordered, magnitudes, right=True) - 1
    last = tile.shape[1] - 1
    return (before + up_to).to(tile.dtype) / (2 * last) if last else torch.full_like(tile, 0.5)


def uniform(first: int, second: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Numbers start … start + count - 1 of the stream of two 32-bit words, float32 in [0, 1), 24 bits each.

    A counter is mixed with the words by the 32-bit finaliser "lowbias32" (Wellons 2018), twice.
    """
    if COMPILED and torch.device(device).type == "cpu":
        numbers = np.empty(count, np.float32)
        loops().uniform(np.uint32(first), np.uint32(second), start, numbers)
        return torch.from_numpy(numbers)
    places = torch.arange(start, start + count, dtype=torch.int64, device=device)
    return (_mixed(_mixed(places ^ first) ^ second) >> 8).float() * 2.0**-24


def _mixed(x: Tensor) -> Tensor:
    x = x & _MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def compiles(tensor: Tensor) -> bool:
    """Whether numba works on this tensor."""
    return COMPILED and tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.float64)


def _flat(tensor: Tensor) -> Array:
    return tensor.view(-1).numpy()


def loops() -> ModuleType:
    """The compiled loops."""
    # Import numba lazily: it costs about 0.3 s, and most merges never need it.
    from lora_cli.algebra import compiled

    return compiled
