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

HEIGHT, WIDTH = 8, 128
"""Rows and columns of a tile, which with its sums fits a core's nearest cache."""
SPOT = HEIGHT * WIDTH
"""The entries of a tile. Sums over them lie side by side: the compiler then knows that they do not overlap."""
DEPTH = 8
"""The ranks that are added at once: so many numbers of two rows of B stay in registers."""
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


@partial(loop, once=True)
def _form(b: Array, a: Array, start: int, end: int, tile: Array) -> None:
    """The entries of a tile from some pieces of factors, one rank after another. See `merge`."""
    tile[:] = 0
    for piece in range(start, end):
        x = a[piece]
        for i in range(0, HEIGHT, 2):
            two, y = tile[i * WIDTH : (i + 2) * WIDTH], b[piece, i * DEPTH : (i + 2) * DEPTH]
            # All DEPTH by name: with an inner loop over the ranks the columns would not be vectorised.
            b0, b1, b2, b3, b4, b5, b6, b7 = y[0], y[1], y[2], y[3], y[4], y[5], y[6], y[7]
            c0, c1, c2, c3, c4, c5, c6, c7 = y[8], y[9], y[10], y[11], y[12], y[13], y[14], y[15]
            for j in range(WIDTH):
                a0, a1, a2, a3 = x[j], x[WIDTH + j], x[2 * WIDTH + j], x[3 * WIDTH + j]
                a4, a5, a6, a7 = x[4 * WIDTH + j], x[5 * WIDTH + j], x[6 * WIDTH + j], x[7 * WIDTH + j]
                one = two[j] + b0 * a0 + b1 * a1 + b2 * a2 + b3 * a3
                two[j] = one + b4 * a4 + b5 * a5 + b6 * a6 + b7 * a7
                one = two[WIDTH + j] + c0 * a0 + c1 * a1 + c2 * a2 + c3 * a3
                two[WIDTH + j] = one + c4 * a4 + c5 * a5 + c6 * a6 + c7 * a7


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
def tally(factors: tuple[Array, Array], rows: tuple[int, int], bracket: Array, found: Array) -> tuple[int, int]:
    """Of some rows of tiles the number of magnitudes above bracket[1], and of those in (bracket[0], bracket[1]].

    The latter go to `found`, which has one place more than there are entries. factors: B and A as `merge` takes them.
    """
    b, a = factors
    tile = np.empty(SPOT, found.dtype)
    above, count = 0, 0
    for column in range(a.shape[0]):
        for row in range(rows[0], rows[1]):
            _form(b[row], a[column], 0, a.shape[1], tile)
            over, count = _inside(tile, bracket[0], bracket[1], found, count)
            above += over
    return above, count


@loop
def merge(
    factors: tuple[Array, Array, Array],
    rows: tuple[int, int],
    table: Array,
    words: Array,
    how: tuple[int, Any, Any],
    result: Array,
) -> None:
    """Some rows of tiles of the merged update, into `result` (out, in).

    factors: B by rows of tiles, pieces of DEPTH ranks, and rows and ranks of a piece, those of all updates one after
        another; A by columns of tiles, pieces, and ranks and columns of a piece; where the pieces of each update end.
        What is beyond the ranks, rows and columns is zero.
    table: per adapter its weight, the weight's size, and the magnitudes from which on and below which an entry counts.
    words: per adapter the two words of its stream of random numbers.
    how: SUM, TOTAL or FREQUENCY; the density below which a drawn number keeps its entry; what divides the entries.
    """
    (b, a, ends), (election, density, divisor), (out, inn) = factors, how, result.shape
    two, mean, sums = np.empty((2, SPOT), b.dtype), np.empty(SPOT, b.dtype), np.empty(4 * SPOT, b.dtype)
    for column in range(a.shape[0]):
        for row in range(rows[0], rows[1]):
            mean[:] = 0
            sums[:] = 0
            start = 0
            for k in range(ends.size):
                values = two[k % 2]
                _form(b[row], a[column], start, ends[k], values)
                start = ends[k]
                if density < 1:
                    _drop(values.reshape(HEIGHT, WIDTH), words[k], row * HEIGHT * inn + column * WIDTH, inn, density)
                if divisor != 1:
                    values /= divisor
                if election == SUM:
                    _add(values, table[k], mean)
                elif k % 2:
                    _cast_two(two[0], values, table[k - 1], table[k], sums)
                elif k + 1 == ends.size:
                    _cast(values, table[k, 0], table[k, 1], table[k, 2], sums)
                if election == FREQUENCY:
                    vote(values, table[k, 2], True, np.sign(table[k, 0]), mean)
            if election != SUM:
                _elected(sums, mean, election == TOTAL)
            down, across = min(HEIGHT, out - row * HEIGHT), min(WIDTH, inn - column * WIDTH)
            place = result[row * HEIGHT : row * HEIGHT + down, column * WIDTH : column * WIDTH + across]
            place[:] = mean.reshape(HEIGHT, WIDTH)[:down, :across]


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
def _cast_two(values: Array, others: Array, row: Array, other: Array, sums: Array) -> None:
    """`_cast` of two tiles, one after the other at each entry, so that the sums are read and written once."""
    nothing = values.dtype.type(0)
    weight, share, cut = row[0], row[1], row[2]
    weight_2, share_2, cut_2 = other[0], other[1], other[2]
    for i in range(values.size):
        value, value_2 = values[i] * weight, others[i] * weight_2
        kept, kept_2 = abs(values[i]) >= cut, abs(others[i]) >= cut_2
        up, down = kept & (value > 0), kept & (value < 0)
        up_2, down_2 = kept_2 & (value_2 > 0), kept_2 & (value_2 < 0)
        sums[i] = sums[i] + (value if up else nothing) + (value_2 if up_2 else nothing)
        sums[i + SPOT] = sums[i + SPOT] + (value if down else nothing) + (value_2 if down_2 else nothing)
        sums[i + 2 * SPOT] = sums[i + 2 * SPOT] + (share if up else nothing) + (share_2 if up_2 else nothing)
        sums[i + 3 * SPOT] = sums[i + 3 * SPOT] + (share if down else nothing) + (share_2 if down_2 else nothing)


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
