"""The loops that numba compiles, free of Python's lock. Import this only where they run: numba takes about 0.3 s.

`tally` and `merge` form the entries of updates a tile at a time, in the nearest cache, and store no dense update.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

SPOT = 4096
"""The entries of a tile. Sums over them lie side by side: the compiler then knows that they do not overlap."""
DEPTH = 64
"""The most ranks of one product: the library that numba calls starts threads of its own for larger ones."""
SUM, TOTAL, FREQUENCY = 0, 1, 2
"""What `merge` makes of the entries: their weighted sum, or an election by summed values or by count."""

GROUP = 32
"""Sums side by side, which the processor adds to at once."""

# Answers that are held at once in `tally`.
_MARKS = 512


def loop(function: Callable[..., Any], *, once: bool = False) -> Callable[..., Any]:
    """`function` compiled when first called, kept on disk where there is a place for it.

    once: round a product and the sum with it once, as torch does.
    """
    # numpy's division skips a check for zero in every step.
    compiled = partial(numba.njit, nogil=True, error_model="numpy", fastmath={"contract"} if once else False)
    try:
        found: Callable[..., Any] = compiled(cache=True)(function)
    except RuntimeError:  # neither this folder nor the user's cache folder can be written
        found = compiled()(function)
    return found


@loop
def _form(factors: tuple[Array, Array], place: tuple[int, int], shape: tuple[int, int], tile: Array) -> None:
    """The entries of one update (out, in) from a row and column on, for factors as `tally` takes them."""
    (b, a), (row, column), (out, inn), (down, across) = factors, place, shape, tile.shape
    rank = a.size // inn
    if rank == 0:
        tile[:] = 0
    for start in range(0, rank, DEPTH):
        deep = min(DEPTH, rank - start)
        at_b, at_a = start * out + row * deep, start * inn + column * deep
        left = b[at_b : at_b + down * deep].reshape(down, deep)
        right = a[at_a : at_a + deep * across].reshape(deep, across)
        product = tile if start == 0 else np.empty_like(tile)
        np.dot(left, right, product)
        if start > 0:
            for i in range(down):
                for j in range(across):
                    tile[i, j] += product[i, j]


@loop
def _inside(values: Array, low: Any, high: Any, found: Array, count: int) -> tuple[int, int]:
    """How many magnitudes are above `high`; those in (low, high] go to found[count:]."""
    # Compare all entries, then look at eight of the answers at once.
    marks = np.empty(_MARKS, np.uint8)
    words = marks.view(np.uint64)
    one, ones = np.uint64(1), np.uint64(0x0101010101010101)
    above = np.uint64(0)
    for start in range(0, values.size, _MARKS):
        some = values[start : start + _MARKS]
        for i in range(some.size):
            # 0 below the bracket, 1 in it, 2 above
            marks[i] = np.uint8(abs(some[i]) > low) + np.uint8(abs(some[i]) > high)
        whole = some.size // 8
        for g in range(whole):
            # The highest byte of the product is the sum of all eight.
            above += (((words[g] >> one) & ones) * ones) >> np.uint64(56)
            if words[g] & ones:
                for i in range(8 * g, 8 * g + 8):
                    found[count] = abs(some[i])
                    count += marks[i] & 1
        for i in range(8 * whole, some.size):
            above += np.uint64(marks[i] >> 1)
            found[count] = abs(some[i])
            count += marks[i] & 1
    return int(above), count


@loop
def tally(
    factors: tuple[Array, Array], grid: tuple[int, int, int, int], rows: tuple[int, int], bracket: Array, found: Array
) -> tuple[int, int]:
    """Of some rows of an update the number of magnitudes above bracket[1], and of those in (bracket[0], bracket[1]].

    The latter go to `found`, which has one place more than there are entries.

    factors: B and A flat, every DEPTH ranks after the ones before; A's in stripes of a tile's width.
    grid: rows and columns of the update and of a tile.
    """
    out, inn, height, width = grid
    tile = np.empty(SPOT, found.dtype)
    above, count = 0, 0
    for column in range(0, inn, width):
        across = min(width, inn - column)
        for row in range(rows[0], rows[1], height):
            down = min(height, rows[1] - row)
            values = tile[: down * across]
            _form(factors, (row, column), (out, inn), values.reshape(down, across))
            over, count = _inside(values, bracket[0], bracket[1], found, count)
            above += over
    return above, count


@loop
def merge(
    stacks: tuple[Array, Array, Array],
    grid: tuple[int, int, int, int],
    rows: tuple[int, int],
    table: Array,
    words: Array,
    how: tuple[int, Any, Any],
    result: Array,
) -> None:
    """Some rows of the merged update, into `result` (out, in).

    stacks: the factors, as `tally` takes them, of all updates one after another, and the ranks.
    table: per adapter its weight, the weight's size, and the magnitudes from which on and below which an entry counts.
    words: per adapter the two words of its stream of random numbers.
    how: SUM, TOTAL or FREQUENCY; the density below which a drawn number keeps its entry; what divides the entries.
    """
    (b, a, ranks), (out, inn, height, width), (election, density, divisor) = stacks, grid, how
    tile, votes, sums = np.empty(SPOT, b.dtype), np.empty(SPOT, b.dtype), np.empty(4 * SPOT, b.dtype)
    for column in range(0, inn, width):
        across = min(width, inn - column)
        for row in range(rows[0], rows[1], height):
            down = min(height, rows[1] - row)
            values, mean = tile[: down * across], votes[: down * across]
            mean[:] = 0
            sums[:] = 0
            at_b, at_a = 0, 0
            for k in range(ranks.size):
                end_b, end_a = at_b + ranks[k] * out, at_a + ranks[k] * inn
                _form((b[at_b:end_b], a[at_a:end_a]), (row, column), (out, inn), values.reshape(down, across))
                at_b, at_a = end_b, end_a
                if density < 1:
                    _drop(values.reshape(down, across), words[k], row * inn + column, inn, density)
                if divisor != 1:
                    values /= divisor
                if election == SUM:
                    _add(values, table[k], mean)
                else:
                    _cast(values, table[k, 0], table[k, 1], table[k, 2], sums)
                if election == FREQUENCY:
                    vote(values, table[k, 2], True, np.sign(table[k, 0]), mean)
            if election != SUM:
                _elected(sums, mean, election == TOTAL)
            result[row : row + down, column : column + across] = mean.reshape(down, across)


@partial(loop, once=True)
def _add(values: Array, row: Array, total: Array) -> None:
    nothing = values.dtype.type(0)
    weight, low, high = row[0], row[2], row[3]
    for i in range(values.size):
        value = values[i]
        kept = (abs(value) >= low) & (abs(value) < high)
        total[i] += (value if kept else nothing) * weight


@loop
def _cast(values: Array, weight: Any, share: Any, cut: Any, sums: Array) -> None:
    nothing = values.dtype.type(0)
    for i in range(values.size):
        value = values[i] * weight
        kept = abs(values[i]) >= cut
        up, down = kept & (value > 0), kept & (value < 0)
        sums[i] += value if up else nothing
        sums[i + SPOT] += value if down else nothing
        sums[i + 2 * SPOT] += share if up else nothing
        sums[i + 3 * SPOT] += share if down else nothing


@loop
def _elected(sums: Array, votes: Array, total: bool) -> None:
    nothing, one = votes.dtype.type(0), votes.dtype.type(1)
    for i in range(votes.size):
        # Read all values first: a conditional load would prevent vectorisation.
        up, down, for_up, for_down = sums[i], sums[i + SPOT], sums[i + 2 * SPOT], sums[i + 3 * SPOT]
        ballot = up + down if total else votes[i]
        won = up if ballot > 0 else down
        share = for_up if ballot > 0 else for_down
        won = nothing if ballot == 0 else won
        share = one if share == 0 else share
        votes[i] = won / share


@loop
def cast(tile: Array, weight: Any, share: Any, cut: Any, sums: Array) -> None:
    """Add weight · tile where |tile| reaches `cut` to the four sums of each spot, by sign, and `share` as often."""
    for start in range(0, tile.size, SPOT):
        _cast(tile[start : start + SPOT], weight, share, cut, sums[4 * start : 4 * start + 4 * SPOT])


@loop
def vote(tile: Array, cut: Any, by_sign: bool, sign: Any, votes: Array) -> None:
    """Add tile, or sign · sgn(tile), to `votes` where |tile| reaches `cut`."""
    nothing = tile.dtype.type(0)
    for i in range(tile.size):
        value = tile[i]
        own = (sign if value > 0 else (-sign if value < 0 else nothing)) if by_sign else value
        votes[i] += own if abs(value) >= cut else nothing


@loop
def elected(sums: Array, votes: Array, total: bool) -> None:
    """The mean of the elected sign at every entry, in `votes`."""
    for start in range(0, votes.size, SPOT):
        _elected(sums[4 * start : 4 * start + 4 * SPOT], votes[start : start + SPOT], total)


@loop
def _drop(tile: Array, words: Array, start: int, apart: int, density: Any) -> None:
    nothing = tile.dtype.type(0)
    drawn = np.empty(tile.shape[1], np.float32)
    for row in range(tile.shape[0]):
        uniform(words[0], words[1], start + row * apart, drawn)
        for i in range(drawn.size):
            tile[row, i] = tile[row, i] if drawn[i] < density else nothing


@loop
def squares(values: Array, sums: Array) -> float:
    """Sum of the squares; `sums` are GROUP zeros."""
    groups = values.size // GROUP
    for g in range(groups):
        group = values[g * GROUP : g * GROUP + GROUP]
        for i in range(GROUP):
            sums[i] += np.float64(group[i]) * np.float64(group[i])
    for i in range(groups * GROUP, values.size):
        sums[0] += np.float64(values[i]) * np.float64(values[i])
    return float(sums.sum())


@loop
def mean_ranks(rows: Array, order: Array, ranks: Array) -> None:
    """Places from 0 to 1 of the entries of each row, which `order` sorts; equal ones share the mean of theirs."""
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


@loop
def uniform(first: Any, second: Any, start: int, numbers: Array) -> None:
    """Numbers of a stream from place `start` on."""
    for i in range(numbers.size):
        x = np.uint32(start + i) ^ first
        for word in (second, np.uint32(0)):
            x = np.uint32(np.uint32(x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D))
            x = np.uint32(np.uint32(x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B))
            x = np.uint32(x ^ (x >> np.uint32(16))) ^ word
        numbers[i] = np.float32(np.uint32(x) >> np.uint32(8)) * np.float32(2.0**-24)
