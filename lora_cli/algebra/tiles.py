"""Element by element work on dense updates, a block of rows at a time: never all updates in memory, not even one."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from lora_cli.algebra import kernels
from lora_cli.algebra.draws import uniform
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
            return exact_threshold(self._parts(update, pieces), density, inside, self._height)

        found = [threshold(u) for u in self.updates] if inside > 1 else _each(threshold, self.updates, workers)
        return torch.tensor(found, dtype=torch.float64)

    def _parts(self, update: LowRank, pieces: int) -> list["Part"]:
        # Use whole blocks, so that entries are rounded as in `merge`.
        blocks = math.ceil(self.shape[0] / self._height)
        height = math.ceil(blocks / pieces) * self._height
        chunks = [LowRank(update.B[rows], update.A) for rows in _row_blocks(self.shape[0], height)]
        return [Part(chunk.shape, lambda chunk=chunk: chunk) for chunk in chunks]  # type: ignore[misc]


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
        tile = self._take()
        for update in self.updates:
            yield torch.mm(update.B[self.rows], update.A, out=tile)

    def zeros(self) -> Tensor:
        """An empty sum, (rows, in), good until the next block."""
        return self._take().zero_()

    def uniform(self, seed: int) -> Iterator[Tensor]:
        """For every adapter numbers from [0, 1), (rows, in) float32: those of its own stream for these entries."""
        width, height = self.updates.shape[1], self.rows.stop - self.rows.start
        for key in self.updates.keys:
            yield uniform(seed, key, self.rows.start * width, height * width, self.updates[0].B.device).view(height, -1)

    def _take(self) -> Tensor:
        height = self.rows.stop - self.rows.start
        if self._taken == len(self._lent):
            self._lent.append(self.updates[0].B.new_empty(height, self.updates.shape[1]))
        self._taken += 1
        return self._lent[self._taken - 1][:height]


class Ballot:
    """An election of one sign per entry, and the mean of the values that have it, in one pass over the adapters.

    Args:
        block: of whose entries.
        election: "total": the sign of Σ w_i x_i wins; "frequency": that of Σ sgn(w_i x_i); "plain": that of Σ x_i.
    """

    def __init__(self, block: Block, election: Election = "total") -> None:
        self._plus, self._minus, self._agreed, self._against = (block.zeros() for _ in range(4))
        self._votes = None if election == "total" else block.zeros()
        self._by_sign = election == "frequency"

    def cast(self, tile: Tensor, weight: float, cut: float = 0.0) -> None:
        """Hand in one adapter's entries and weight; entries with a magnitude below `cut` do not count. Keeps `tile`."""
        kernels.cast(tile, weight, cut, self._plus, self._minus, self._agreed, self._against)
        if self._votes is None:
            return
        kept = tile * (tile.abs() >= cut).to(tile.dtype)
        if self._by_sign:
            kept = kept.sign_().mul_((weight > 0) - (weight < 0))
        self._votes.add_(kept)

    def mean(self) -> Tensor:
        """Σ w_i x_i / Σ |w_i| over the adapters with the elected sign; 0 where votes cancel or nobody voted."""
        votes = self._plus + self._minus if self._votes is None else self._votes
        return kernels.elected(votes, self._plus, self._minus, self._agreed, self._against)


@dataclass(frozen=True, slots=True)
class Part:
    """A part of an adapter's update, (out, in) `shape`, read when it is needed."""

    shape: tuple[int, int]
    read: Callable[[], LowRank]


def exact_threshold(parts: Sequence[Part], density: float, workers: int = 1, height: int | None = None) -> float:
    """The smallest magnitude among the ⌊density · size⌉ (at least one) largest entries of all parts; 0 at density 1.

    A sample brackets the value; one pass over the dense entries counts those above the bracket and collects those in
    it. Where the bracket missed, a wider one is tried. At most size^⅔ entries are held besides one tile per worker,
    save where many are equal.

    Args:
        workers: how many parts are worked on at once. The result does not depend on it.
        height: rows per block; decided by the shape where not given.
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
            return _count(part.read(), low, high, height)

        counts = _each(count, parts, workers)
        above, inside = sum(over for over, _ in counts), torch.cat([found for _, found in counts])
        if above < k <= above + len(inside):
            return kernels.largest(inside, k - above)
        if low == 0.0 and k > above:
            return 0.0
        deviations *= 4


def _sample(parts: Sequence[Part], size: int, workers: int) -> Tensor:
    """Magnitudes drawn entry by entry, each part by its size; about size^⅔, which costs what it saves.

    Single entries at r multiplications each: those of whole rows would be too much alike.
    """
    if size <= _SMALL:
        return torch.empty(0)
    rate = size ** (-1 / 3)

    def draw(place: int) -> Tensor:
        update = parts[place].read()
        generator = torch.Generator().manual_seed(place)
        count = math.ceil(rate * math.prod(update.shape))
        rows, columns = (
            torch.randint(side, (count,), generator=generator).to(update.B.device) for side in update.shape
        )
        return kernels.entries(update.B, update.A, rows, columns).abs()

    return torch.cat(_each(draw, range(len(parts)), workers))


def _bracket(sample: Tensor, density: float, deviations: float) -> tuple[float, float]:
    """Magnitudes between which the threshold lies if the sample's quantile errs by no more than so many deviations."""
    count = len(sample)
    middle, spread = (1 - density) * count, deviations * (math.sqrt(count * density * (1 - density)) + 1)
    low, high = math.floor(middle - spread), math.ceil(middle + spread)
    return (
        kernels.largest(sample, count - low) if low >= 0 else 0.0,
        kernels.largest(sample, count - high) if high < count else math.inf,
    )


def _count(update: LowRank, low: float, high: float, height: int | None) -> tuple[int, Tensor]:
    above, inside = 0, [update.B.new_empty(0)]
    tile = update.B.new_empty(height or _height(update), update.shape[1])
    room = tile.new_empty(tile.numel() + 1)
    for rows in _row_blocks(update.shape[0], len(tile)):
        block = torch.mm(update.B[rows], update.A, out=tile[: rows.stop - rows.start])
        over, found = kernels.tally(block, low, high, room)
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
