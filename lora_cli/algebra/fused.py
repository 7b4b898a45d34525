"""Dense work on the factors of a whole module in one compiled loop: every entry is formed near the processor and used
there, for all adapters, and no tile of an update is ever written to memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_cli.algebra import kernels
from lora_cli.algebra.draws import stream
from lora_cli.algebra.lowrank import LowRank

Array = NDArray[Any]

# Rows and columns of a tile: two of them, or one and its sums, fit a core's nearest caches.
HEIGHT, WIDTH = 16, 256
# Entries handed to a loop at once; a thread is busy with so many for a fraction of a millisecond per adapter.
_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True)
class Drop:
    """Entries dropped at random, by the draws of a seed: each stays with probability `density`, divided by it."""

    density: float
    seed: int


@dataclass(frozen=True, slots=True)
class Entries:
    """Which entries x of n updates count, and how much: those with low_i ≤ |x| < high_i, after `drop`, times weight_i.

    No `low` or no `high` (n numbers each) means no such bound.
    """

    weights: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    drop: Drop | None = None

    @property
    def density(self) -> float:
        """The share of entries that is left, 1 if none are dropped."""
        return self.drop.density if self.drop else 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Fused:
    """n updates (out, in), their factors laid out for the loops.

    stacks: all Bs one after another, all As in stripes of a tile's columns, and the ranks; see `compiled.merge`.
    """

    stacks: tuple[Array, Array, Array]
    shape: tuple[int, int]

    @classmethod
    def of(cls, updates: Sequence[LowRank]) -> "Fused | None":
        """The updates laid out, or None where no numba runs on them."""
        if not kernels.compiles(updates[0].B):
            return None
        ranks, depth = np.array([update.rank for update in updates]), kernels.loops().DEPTH
        pieces = [
            (update.B[:, start : start + depth], update.A[start : start + depth])
            for update in updates
            for start in range(0, update.rank, depth)
        ]
        stripes = [slice(start, start + WIDTH) for start in range(0, updates[0].shape[1], WIDTH)]
        empty = updates[0].B.new_empty(0)
        b = torch.cat([empty, *(b.reshape(-1) for b, _ in pieces)])
        a = torch.cat([empty, *(a[:, stripe].reshape(-1) for _, a in pieces for stripe in stripes)])
        return cls((b.numpy(), a.numpy(), ranks), updates[0].shape)

    def spans(self) -> list[tuple[int, int]]:
        """The bounds of runs of rows that are work for one call."""
        step = max(1, _AT_ONCE // (self.shape[1] * HEIGHT)) * HEIGHT
        return [(start, min(start + step, self.shape[0])) for start in range(0, self.shape[0], step)]

    def tally(self, low: float, high: float) -> tuple[int, Tensor]:
        """Of the one update the number of magnitudes above `high`, and the magnitudes in (low, high]."""
        b, a, _ = self.stacks
        spans = self.spans()
        room = np.empty((spans[0][1] - spans[0][0]) * self.shape[1] + 1, b.dtype)
        bracket = np.array([low, high], b.dtype)
        above, inside = 0, [room[:0]]
        for rows in spans:
            over, count = kernels.loops().tally((b, a), self._grid, rows, bracket, room)
            above += over
            inside.append(room[:count].copy())
        return above, torch.from_numpy(np.concatenate(inside))

    def merging(
        self, entries: Entries, keys: Sequence[int], election: str | None, result: Tensor
    ) -> Callable[[tuple[int, int]], None]:
        """What merges some rows into `result` (out, in): a weighted sum, or an election if one is named.

        keys: those of the updates, for random numbers.
        """
        loops, dtype = kernels.loops(), result.numpy().dtype.type
        seed, density = entries.drop.seed if entries.drop else 0, entries.density
        divisor = density if election else 1.0
        table = np.empty((len(keys), 4), dtype)
        table[:, 0] = [weight if election else weight / density for weight in entries.weights]
        table[:, 1] = np.abs(table[:, 0])
        table[:, 2] = entries.low or 0.0
        table[:, 3] = entries.high or np.inf
        words = np.array([stream(seed, key) for key in keys], np.uint32)
        rule = {None: loops.SUM, "total": loops.TOTAL, "frequency": loops.FREQUENCY}[election]
        how = rule, np.float32(density), dtype(divisor)
        return lambda rows: loops.merge(self.stacks, self._grid, rows, table, words, how, result.numpy())

    @property
    def _grid(self) -> tuple[int, int, int, int]:
        return *self.shape, HEIGHT, WIDTH
