"""Element by element work on dense updates, a block of rows at a time: never all updates in memory, not even one."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from typing import Literal, TypeVar

import torch
from torch import Tensor

from lora_cli.algebra import kernels
from lora_cli.algebra.draws import uniform
from lora_cli.algebra.fused import Drop, Entries, Fused
from lora_cli.algebra.lowrank import LowRank
from lora_cli.algebra.updates import Per, Updates

T = TypeVar("T")
R = TypeVar("R")

Election = Literal["total", "frequency", "plain"]
"""The sign that wins an entry: that of the sum of weighted values, that of most adapters, or that of the sum of
unweighted values."""

# One tile and the sums over tiles should fit a core's cache; a GPU wants fewer and larger pieces.
_TILE_BYTES = {"cpu": 1 << 19}
_TILE_BYTES_ELSEWHERE = 1 << 28
# Updates with at most this many entries are searched without a sample.
_SMALL = 1 << 14
# A sample has so many times size^⅔ entries, which cost about as much as they save.
_SAMPLED = 2


class DeltaTiles:
    """The dense updates of n adapters in one module, (n, out, in), formed row block by row block.

    Args:
        updates: those of one module.
        workers: the number of blocks in work at once. Results do not depend on it.
    """

    def __init__(self, updates: Updates, workers: int = 1) -> None:
        self.updates = updates
        self.shape = updates.shape
        self._workers = workers if updates[0].B.device.type == "cpu" else 1
        self._height = _height(updates[0])

    def __len__(self) -> int:
        return len(self.updates)

    def sum(self, entries: Entries) -> Tensor:
        """The sum of the entries that count, each times its update's weight, (out, in)."""
        found = self._fused(entries, None)
        return self.merge(lambda block: block.summed(entries)) if found is None else found

    def elect(self, entries: Entries, election: Election = "total") -> Tensor:
        """The mean of the entries that count and have the elected sign, as a `Ballot` finds it, (out, in)."""
        found = self._fused(entries, election)
        return self.merge(lambda block: block.elected(entries, election)) if found is None else found

    def merge(self, rule: Callable[["Block"], Tensor]) -> Tensor:
        """The dense result (out, in) of `rule`, which turns a block of rows into its merged rows (rows, in)."""
        result = self.updates[0].B.new_empty(self.shape)

        def merge_rows(block: Block) -> None:
            result[block.rows] = rule(block)

        self.each(merge_rows)
        return result

    def each(self, work: Callable[["Block"], R]) -> list[R]:
        """The result of `work` for every block of rows, in order."""
        blocks = [*_row_blocks(self.shape[0], self._height)]
        todo = iter(range(len(blocks)))
        done: dict[int, R] = {}

        def work_on(_: int) -> None:
            lent: list[Tensor] = []
            for place in todo:
                done[place] = work(Block(self.updates, blocks[place], lent))

        _each(work_on, range(self._workers), self._workers)
        return [done[place] for place in range(len(blocks))]

    def thresholds(self, density: float, per: Per = "module") -> Tensor:
        """`exact_threshold` of every update, or of the whole adapters where there are any, (n,) float64."""
        if per == "adapter" and self.updates.whole is not None:
            return self.updates.whole.thresholds(density)
        n, workers = len(self), self._workers
        # Many adapters: one per worker. Few adapters: split them into parts.
        pieces, inside = (1, 1) if n >= workers else (2 * workers, workers)

        def threshold(update: LowRank) -> float:
            return exact_threshold(self._parts(update, pieces), density, inside)

        found = [threshold(u) for u in self.updates] if inside > 1 else _each(threshold, self.updates, workers)
        return torch.tensor(found, dtype=torch.float64)

    def _parts(self, update: LowRank, pieces: int) -> list["Part"]:
        # Cut between tiles, so that entries are rounded as in `sum` and `elect`.
        unit = kernels.loops().HEIGHT if kernels.compiles(update.B) else self._height
        height = math.ceil(self.shape[0] / (pieces * unit)) * unit
        chunks = [LowRank(update.B[rows], update.A) for rows in _row_blocks(self.shape[0], height)]
        return [Part(chunk.shape, lambda chunk=chunk: chunk) for chunk in chunks]  # type: ignore[misc]

    def _fused(self, entries: Entries, election: Election | None) -> Tensor | None:
        """The result from the factors in one compiled loop, or None where none runs."""
        fused = Fused.of(self.updates)
        if fused is None:
            return None
        result = self.updates[0].B.new_empty(self.shape)
        _each(fused.merging(entries, self.updates.keys, election, result), fused.spans(), self._workers)
        return result


class Block:
    """Some rows of every adapter's dense update, one adapter after another in one tile that is used again.

    Iterating gives n tiles (rows, in), each to be used, and changed if need be, before the next is asked for.

    Args:
        lent: memory of earlier blocks, to be used again: fresh pages cost more than what is done with them.
    """

    def __init__(self, updates: Updates, rows: slice, lent: list[Tensor]) -> None:
        self.updates = updates
        self.rows = rows
        self._lent = lent
        self._taken = 0

    def __iter__(self) -> Iterator[Tensor]:
        tile = self._tile()
        for update in self.updates:
            yield torch.mm(update.B[self.rows], update.A, out=tile)

    def uniform(self, seed: int) -> Iterator[Tensor]:
        """For every adapter numbers from [0, 1), (rows, in) float32: those of its own stream for these entries."""
        width, height = self.updates.shape[1], self.rows.stop - self.rows.start
        for key in self.updates.keys:
            yield uniform(seed, key, self.rows.start * width, height * width, self.updates[0].B.device).view(height, -1)

    def summed(self, entries: Entries) -> Tensor:
        """The sum of the entries that count, each times its update's weight, (rows, in)."""
        total = self.zeros()
        low, high = entries.low or repeat(0.0), entries.high or repeat(math.inf)
        bounds = zip(entries.weights, low, high, strict=False)
        for tile, (weight, least, most) in zip(self._left(entries.drop), bounds, strict=True):
            if entries.low or entries.high:
                size = tile.abs()
                tile.mul_(((size >= least) & (size < most)).to(tile.dtype))
            total.add_(tile, alpha=weight / entries.density)
        return total

    def elected(self, entries: Entries, election: Election) -> Tensor:
        """The mean of the entries that count and have the elected sign, (rows, in)."""
        ballot = Ballot(self, election)
        cuts = entries.low or [0.0] * len(entries.weights)
        for tile, weight, cut in zip(self._left(entries.drop), entries.weights, cuts, strict=True):
            ballot.cast(tile.div_(entries.density) if entries.drop else tile, weight, cut)
        return ballot.mean()

    def _left(self, drop: Drop | None) -> Iterator[Tensor]:
        """The tiles with what is dropped set to zero."""
        if drop is None:
            yield from self
            return
        for tile, drawn in zip(self, self.uniform(drop.seed), strict=True):
            yield tile.mul_((drawn < drop.density).to(tile.dtype))

    def zeros(self) -> Tensor:
        """An empty sum, (rows, in), good until the next block."""
        return self._tile().zero_()

    def lend(self, count: int) -> Tensor:
        """A vector of `count` numbers that holds anything, good until the next block."""
        if self._taken == len(self._lent):
            # The first block is the largest.
            self._lent.append(self.updates[0].B.new_empty(count))
        self._taken += 1
        return self._lent[self._taken - 1][:count]

    def _tile(self) -> Tensor:
        height, width = self.rows.stop - self.rows.start, self.updates.shape[1]
        return self.lend(height * width).view(height, width)


class Ballot:
    """An election of one sign per entry, and the mean of the values that have it, in one pass over the adapters.

    Args:
        block: of whose entries.
        election: "total": the sign of Σ w_i x_i wins; "frequency": that of Σ sgn(w_i x_i); "plain": that of Σ x_i.
    """

    def __init__(self, block: Block, election: Election = "total") -> None:
        self._election = election
        self._votes = block.zeros()
        self._sums = block.lend(kernels.sums_of(self._votes)).zero_()

    def cast(self, tile: Tensor, weight: float, cut: float = 0.0) -> None:
        """Hand in one adapter's entries and weight; entries with a magnitude below `cut` do not count. Keeps `tile`."""
        kernels.cast(tile, weight, cut, self._sums)
        if self._election != "total":
            sign = (weight > 0) - (weight < 0) if self._election == "frequency" else None
            kernels.vote(tile, cut, sign, self._votes)

    def mean(self) -> Tensor:
        """Σ w_i x_i / Σ |w_i| over the adapters with the elected sign; 0 where votes cancel or nobody voted."""
        return kernels.elected(self._sums, self._votes, self._election == "total")


@dataclass(frozen=True, slots=True)
class Part:
    """A part of an adapter's update, (out, in) `shape`, read when it is needed."""

    shape: tuple[int, int]
    read: Callable[[], LowRank]


def exact_threshold(parts: Sequence[Part], density: float, workers: int = 1) -> float:
    """The smallest magnitude among the ⌊density · size⌉ (at least one) largest entries of all parts; 0 at density 1.

    A sample brackets the value; one pass over the dense entries counts those above the bracket and collects those in
    it. Where the bracket missed, a wider one is tried. A few times size^⅔ entries are held besides a tile per worker,
    more where many are equal.

    Args:
        workers: how many parts are worked on at once. The result does not depend on it.
    """
    size = sum(math.prod(part.shape) for part in parts)
    k = max(1, round(density * size))
    if k == size:
        return 0.0
    sample = _sample(parts, size, workers)
    deviations = 3.0
    while True:
        low, high = _bracket(sample, k / size, deviations)

        def count(part: Part, low: float = low, high: float = high) -> tuple[int, Tensor]:
            return _count(part.read(), low, high)

        counts = _each(count, parts, workers)
        above, inside = sum(over for over, _ in counts), torch.cat([found for _, found in counts])
        if above < k <= above + len(inside):
            return kernels.largest(inside, k - above)
        if low == 0.0 and k > above:
            return 0.0
        deviations *= 4


def _sample(parts: Sequence[Part], size: int, workers: int) -> Tensor:
    """Some magnitudes of each part, by its size, a few times size^⅔ of them.

    Each of a number of blocks has rows and columns of its own, drawn at random. So every row counts alike; quantiles
    are as good as those of single entries at random, which take five times as long.
    """
    if size <= _SMALL:
        return torch.empty(0)
    apart = round(size ** (1 / 3) / _SAMPLED)

    def draw(place: int) -> Tensor:
        update = parts[place].read()
        generator = torch.Generator().manual_seed(place)
        rows, columns = (torch.randperm(side, generator=generator) for side in update.shape)
        blocks, width = min(apart, *update.shape), max(1, update.shape[1] // apart)
        rows = rows[: len(rows) // blocks * blocks].view(blocks, -1).to(update.B.device)
        columns = columns[: blocks * width].view(blocks, width).to(update.B.device)
        return torch.bmm(update.B[rows], update.A[:, columns].transpose(0, 1)).abs_().view(-1)

    return torch.cat(_each(draw, range(len(parts)), workers))


def _bracket(sample: Tensor, density: float, deviations: float) -> tuple[float, float]:
    """Magnitudes between which the threshold lies if the sample's quantile errs by no more than so many deviations."""
    count = len(sample)
    middle, spread = (1 - density) * count, deviations * (math.sqrt(count * density * (1 - density)) + 1)
    low, high = math.floor(middle - spread), math.ceil(middle + spread)
    inside = [place for place in (low, high) if 0 <= place < count]
    found = dict(zip(inside, kernels.ordered(sample, inside), strict=True)) if inside else {}
    return found.get(low, 0.0), found.get(high, math.inf)


def _count(update: LowRank, low: float, high: float) -> tuple[int, Tensor]:
    if fused := Fused.of([update]):
        return fused.tally(low, high)
    above, inside = 0, [update.B.new_empty(0)]
    tile = update.B.new_empty(_height(update), update.shape[1])
    for rows in _row_blocks(update.shape[0], len(tile)):
        over, found = kernels.tally(torch.mm(update.B[rows], update.A, out=tile[: rows.stop - rows.start]), low, high)
        above += over
        inside.append(found)
    return above, torch.cat(inside)


def _height(update: LowRank) -> int:
    tile_bytes = _TILE_BYTES.get(update.B.device.type, _TILE_BYTES_ELSEWHERE)
    return max(1, tile_bytes // (update.shape[1] * update.B.element_size()))


def _row_blocks(rows: int, height: int) -> Iterator[slice]:
    return (slice(start, min(start + height, rows)) for start in range(0, rows, height))


def _each(work: Callable[[T], R], items: Iterable[T] | Sequence[T], workers: int) -> list[R]:
    """`work` done on every item, in order, on no more threads than there are items."""
    items = list(items)
    workers = min(workers, len(items))
    if workers <= 1:
        return [work(item) for item in items]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(work, items))
