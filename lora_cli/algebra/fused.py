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

    factors: all Bs and all As in tiles, and where each update's pieces end; see `compiled.merge`.
    """

    factors: tuple[Array, Array, Array]
    shape: tuple[int, int]

    @classmethod
    def of(cls, updates: Sequence[LowRank]) -> "Fused | None":
        """The updates laid out, or None where no numba runs on them."""
        if not kernels.compiles(updates[0].B):
            return None
        loops, (out, inn) = kernels.loops(), updates[0].shape
        pieces = [-(-update.rank // loops.DEPTH) for update in updates]
        across, down, deep = -(-inn // loops.WIDTH), -(-out // loops.HEIGHT), sum(pieces)
        b = updates[0].B.new_zeros(down * loops.HEIGHT, deep * loops.DEPTH)
        a = updates[0].A.new_zeros(deep * loops.DEPTH, across * loops.WIDTH)
        ends = np.cumsum(pieces)
        for update, end, count in zip(updates, ends.tolist(), pieces, strict=True):
            start = (end - count) * loops.DEPTH
            b[:out, start : start + update.rank] = update.B
            a[start : start + update.rank, :inn] = update.A
        b = b.view(down, loops.HEIGHT, deep, loops.DEPTH).transpose(1, 2).flatten(2)
        a = a.view(deep, loops.DEPTH, across, loops.WIDTH).permute(2, 0, 1, 3).flatten(2)
        return cls((b.contiguous().numpy(), a.contiguous().numpy(), ends), (out, inn))

    def spans(self) -> list[tuple[int, int]]:
        """The bounds of runs of rows of tiles that are work for one call."""
        step, tiles = max(1, _AT_ONCE // (self.shape[1] * kernels.loops().HEIGHT)), len(self.factors[0])
        return [(start, min(start + step, tiles)) for start in range(0, tiles, step)]

    def tally(self, low: float, high: float) -> tuple[int, Tensor]:
        """Of the one update the number of magnitudes above `high`, and the magnitudes in (low, high]."""
        b, a, _ = self.factors
        spans = self.spans()
        room = np.empty((spans[0][1] - spans[0][0]) * a.shape[0] * kernels.loops().SPOT + 1, b.dtype)
        bracket = np.array([low, high], b.dtype)
        above, inside = 0, [room[:0]]
        for rows in spans:
            over, count = kernels.loops().tally((b, a), rows, bracket, room)
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
        return lambda rows: loops.merge(self.factors, rows, table, words, how, result.numpy())
