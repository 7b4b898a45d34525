"""Element by element work on dense updates, a block of rows at a time: never all updates in memory."""

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_cli.adapters.updates import Updates

T = TypeVar("T")
R = TypeVar("R")

TILE_BYTES = 8 << 20
_SAMPLE = 1 << 14


class DeltaTiles:
    """The dense updates of n adapters in one module, (n, out, in), formed row block by row block.

    Args:
        updates: those of one module.
        tile_bytes: how large one block of all adapters may be. Results depend on it only by rounding.
        workers: how many blocks are worked on at once. Results do not depend on it.
    """

    def __init__(self, updates: Updates, tile_bytes: int = TILE_BYTES, workers: int = 1) -> None:
        self.updates = updates
        self.shape = updates[0].shape
        self.tile_bytes = tile_bytes
        self.workers = workers

    def __len__(self) -> int:
        return len(self.updates)

    def merge(self, rule: Callable[[Tensor], Tensor]) -> Tensor:
        """The dense result (out, in) of `rule`, which turns a block (n, rows, in) into its merged rows (rows, in)."""
        out_features, in_features = self.shape
        result = self.updates[0].B.new_empty(out_features, in_features)

        def merge_rows(rows: slice) -> None:
            block = result.new_empty(len(self), rows.stop - rows.start, in_features)
            for update, delta in zip(self.updates, block, strict=True):
                torch.mm(update.B[rows], update.A, out=delta)
            result[rows] = rule(block)

        self._each(merge_rows, self._blocks())
        return result

    def thresholds(self, density: float) -> Tensor:
        """`threshold` of every update, (n,)."""
        return torch.stack(self._each(lambda i: self.threshold(i, density), range(len(self))))

    def threshold(self, i: int, density: float) -> Tensor:
        """The smallest magnitude among the ⌊density · size⌉ (at least one) largest of update i: exact, a scalar tensor.

        A sample of rows brackets the value, one pass over the rows counts what lies above the bracket and collects what
        lies in it. Where the bracket missed, the next pass takes the side on which the value must be.
        """
        out_features, in_features = self.shape
        size = out_features * in_features
        k = max(1, round(density * size))
        low, high = self._bracket(i, k / size)
        while True:
            above, inside = 0, []
            for block in self._magnitudes(i):
                above += int(np.count_nonzero(block > high))
                inside.append(block[(block >= low) & (block <= high)])
            collected = np.concatenate(inside)
            if above < k <= above + len(collected):
                place = len(collected) - (k - above)
                return torch.from_numpy(np.partition(collected, place))[place]
            low, high = (high, float("inf")) if k <= above else (0.0, low)

    def _each(self, work: Callable[[T], R], items: Iterable[T]) -> list[R]:
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(work, items))

    def _bracket(self, i: int, density: float) -> tuple[float, float]:
        """Magnitudes of update i between which its threshold lies, by six standard deviations of a sample's quantile.

        Entries are drawn one by one, each at r multiplications: whole rows would differ from each other too much.
        """
        update, (out_features, in_features) = self.updates[i], self.shape
        count = min(_SAMPLE, out_features * in_features)
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(out_features, (count,), generator=generator)
        columns = torch.randint(in_features, (count,), generator=generator)
        sample = (update.B[rows] * update.A.T[columns]).sum(1).abs()
        middle, spread = (1 - density) * count, 6 * math.sqrt(count * density * (1 - density)) + 8
        low, high = int(middle - spread), int(middle + spread)
        return (
            float(torch.kthvalue(sample, low).values) if low > 0 else 0.0,
            float(torch.kthvalue(sample, high).values) if high <= count else float("inf"),
        )

    def _magnitudes(self, i: int) -> Iterator[NDArray[np.floating[Any]]]:
        # numpy compares, counts and picks several times faster than torch on a CPU. The blocks are those of `merge`:
        # another height could round an entry at the threshold the other way.
        update = self.updates[i]
        for rows in self._blocks():
            yield (update.B[rows] @ update.A).abs_().numpy()

    def _blocks(self) -> Iterator[slice]:
        out_features, in_features = self.shape
        height = max(1, self.tile_bytes // (len(self) * in_features * self.updates[0].B.element_size()))
        for start in range(0, out_features, height):
            yield slice(start, min(start + height, out_features))
