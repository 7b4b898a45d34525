"""Inner loops of the work done element by element: compiled by numba on a CPU, the same formulas in torch elsewhere.

Callers need not know which of the two runs. Both count, elect and draw the same, sums of floats differ by rounding; the
compiled ones are several times faster.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]

COMPILED = True
"""Whether CPU tensors go through numba. Tests turn it off to compare the two."""

# Entries are tested in groups of this size; single entries only if their group has a hit.
_GROUP = 32
_PIECE = 1 << 14
_MASK = 0xFFFFFFFF


def tally(tile: Tensor, low: float, high: float, room: Tensor) -> tuple[int, Tensor]:
    """The number of magnitudes of `tile` above `high`, and the magnitudes in (low, high].

    room: a vector with one entry more than `tile`, which is overwritten.
    """
    if _compiles(tile):
        values, found = _flat(tile), _flat(room)
        above, count = _loop(_tally)(values, values.dtype.type(low), values.dtype.type(high), found)
        return above, room[:count].clone()
    magnitudes = tile.abs()
    over = magnitudes > high
    return int(over.sum()), magnitudes[(magnitudes > low) & ~over]


def largest(magnitudes: Tensor, k: int) -> float:
    """The k-th largest of a vector's entries, 1 ≤ k ≤ size."""
    place = magnitudes.numel() - k
    if _compiles(magnitudes):
        return float(np.partition(magnitudes.numpy(), place)[place])
    return float(torch.kthvalue(magnitudes, place + 1).values)


def entries(B: Tensor, A: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Single entries of B @ A: those at (rows[j], columns[j]), sums over the ranks."""
    across = A.T.contiguous()  # (in, r): the numbers for one entry are contiguous
    if _compiles(B):
        found = torch.empty(len(rows), dtype=B.dtype)
        _loop(_entries)(B.contiguous().numpy(), across.numpy(), rows.numpy(), columns.numpy(), found.numpy())
        return found
    pieces = zip(torch.split(rows, _PIECE), torch.split(columns, _PIECE), strict=True)
    return torch.cat([(B[i] * across[j]).sum(1) for i, j in pieces])


def cast(tile: Tensor, weight: float, cut: float, plus: Tensor, minus: Tensor, agreed: Tensor, against: Tensor) -> None:
    """Add weight · tile, where |tile| reaches `cut`, to `plus` where positive and to `minus` where negative.

    |weight| is added to `agreed` and `against` at the same places. All of one shape and dtype.
    """
    if _compiles(tile):
        scalar = tile.numpy().dtype.type
        sums = (_flat(x) for x in (plus, minus, agreed, against))
        _loop(_cast)(_flat(tile), scalar(weight), scalar(abs(weight)), scalar(cut), *sums)
        return
    kept = torch.where(tile.abs() >= cut, tile * weight, 0)
    plus.add_(kept.clamp(min=0))
    minus.add_(kept.clamp(max=0))
    agreed.add_(kept > 0, alpha=abs(weight))
    against.add_(kept < 0, alpha=abs(weight))


def elected(votes: Tensor, plus: Tensor, minus: Tensor, agreed: Tensor, against: Tensor) -> Tensor:
    """plus / agreed where `votes` are positive, minus / against where negative, 0 elsewhere and over 0; in `votes`."""
    if _compiles(plus):
        _loop(_elected)(*(_flat(x) for x in (votes, plus, minus, agreed, against)))
        return votes
    won = torch.where(votes > 0, plus, minus).masked_fill_(votes == 0, 0)
    share = torch.where(votes > 0, agreed, against)
    return votes.copy_(won.div_(share.masked_fill_(share == 0, 1)))


def squares(values: Tensor) -> float:
    """Sum of the squares of all entries, in float64."""
    if _compiles(values):
        return float(_loop(_squares)(_flat(values.contiguous()), np.zeros(_GROUP)))
    return float(sum(rows.double().square().sum() for rows in torch.split(values, _PIECE // 16)))


def mean_ranks(tile: Tensor) -> Tensor:
    """Place of every magnitude among those of its row, from 0 (smallest) to 1; equal ones share the mean of theirs.

    (rows, n) → (rows, n), in the dtype of `tile`. A row of one entry has the place ½.
    """
    magnitudes = tile.abs()
    if _compiles(tile):
        rows = magnitudes.numpy()
        ranks = np.empty_like(rows)
        _loop(_mean_ranks)(rows, np.argsort(rows, axis=1), ranks)
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
        _loop(_uniform)(np.uint32(first), np.uint32(second), start, numbers)
        return torch.from_numpy(numbers)
    places = torch.arange(start, start + count, dtype=torch.int64, device=device)
    return (_mixed(_mixed(places ^ first) ^ second) >> 8).float() * 2.0**-24


def _mixed(x: Tensor) -> Tensor:
    x = x & _MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def _compiles(tensor: Tensor) -> bool:
    return COMPILED and tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.float64)


def _flat(tensor: Tensor) -> Array:
    return tensor.view(-1).numpy()


@cache
def _loop(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled when first called, kept on disk where there is a place for it, free of Python's lock."""
    # Import numba lazily: it costs about 0.3 s, and most merges never need it.
    import numba

    # numpy's division skips a check for zero in every step.
    compiled = partial(numba.njit, nogil=True, error_model="numpy")
    try:
        loop: Callable[..., Any] = compiled(cache=True)(function)
    except RuntimeError:  # neither this folder nor the user's cache folder can be written
        loop = compiled()(function)
    return loop


def _tally(values: Array, low: Any, high: Any, found: Array) -> tuple[int, int]:
    above: Any = 0
    count: Any = 0
    groups = values.size // _GROUP
    for g in range(groups):
        group = values[g * _GROUP : g * _GROUP + _GROUP]
        over, reach = np.int32(0), np.int32(0)
        for i in range(_GROUP):
            over += np.int32(abs(group[i]) > high)
            reach += np.int32(abs(group[i]) > low)
        above += over
        i, end = 0, count + reach - over
        while count < end:
            found[count] = abs(group[i])
            count += (abs(group[i]) > low) & (abs(group[i]) <= high)
            i += 1
    for i in range(groups * _GROUP, values.size):
        above += abs(values[i]) > high
        found[count] = abs(values[i])
        count += (abs(values[i]) > low) & (abs(values[i]) <= high)
    return above, count


def _entries(b: Array, a: Array, rows: Array, columns: Array, found: Array) -> None:
    for j in range(found.size):
        total = found.dtype.type(0)
        for k in range(b.shape[1]):
            total += b[rows[j], k] * a[columns[j], k]
        found[j] = total


def _cast(
    tile: Array, weight: Any, share: Any, cut: Any, plus: Array, minus: Array, agreed: Array, against: Array
) -> None:
    nothing = tile.dtype.type(0)
    for i in range(tile.size):
        value = tile[i] * weight
        kept = abs(tile[i]) >= cut
        up, down = kept & (value > 0), kept & (value < 0)
        plus[i] += value if up else nothing
        minus[i] += value if down else nothing
        agreed[i] += share if up else nothing
        against[i] += share if down else nothing


def _elected(votes: Array, plus: Array, minus: Array, agreed: Array, against: Array) -> None:
    nothing, one = plus.dtype.type(0), plus.dtype.type(1)
    for i in range(votes.size):
        # Read all values first: a conditional load would prevent vectorisation.
        up, down, for_up, for_down = plus[i], minus[i], agreed[i], against[i]
        ahead, tied = votes[i] > 0, votes[i] == 0
        won = up if ahead else down
        share = for_up if ahead else for_down
        won = nothing if tied else won
        share = one if share == 0 else share
        votes[i] = won / share


def _squares(values: Array, sums: Array) -> float:
    groups = values.size // _GROUP
    for g in range(groups):
        group = values[g * _GROUP : g * _GROUP + _GROUP]
        for i in range(_GROUP):
            sums[i] += np.float64(group[i]) * np.float64(group[i])
    for i in range(groups * _GROUP, values.size):
        sums[0] += np.float64(values[i]) * np.float64(values[i])
    return float(sums.sum())


def _mean_ranks(rows: Array, order: Array, ranks: Array) -> None:
    height, width = rows.shape
    scale = 0.5 / (width - 1) if width > 1 else 0.0
    for row in range(height):
        start = 0
        while start < width:
            end = start
            while end + 1 < width and rows[row, order[row, end + 1]] == rows[row, order[row, start]]:
                end += 1
            for place in range(start, end + 1):
                ranks[row, order[row, place]] = (start + end) * scale if width > 1 else 0.5
            start = end + 1


def _uniform(first: Any, second: Any, start: int, numbers: Array) -> None:
    for i in range(numbers.size):
        x = np.uint32(start + i) ^ first
        for word in (second, np.uint32(0)):
            x = np.uint32(np.uint32(x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D))
            x = np.uint32(np.uint32(x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B))
            x = np.uint32(x ^ (x >> np.uint32(16))) ^ word
        numbers[i] = np.float32(np.uint32(x) >> np.uint32(8)) * np.float32(2.0**-24)
