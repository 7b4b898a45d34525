"""Element by element work on dense updates, a block of rows at a time: never all updates in memory."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lora_cli.adapters.lowrank import LowRank

TILE_BYTES = 8 << 20
_SAMPLE = 1 << 16


class DeltaTiles:
    """The dense updates of n adapters in one module, (n, out, in), formed row block by row block.

    Args:
        updates: one LowRank per adapter, all of shape (out, in).
        tile_bytes: how large one block of all adapters may be. Results depend on it only by rounding.
    """

    def __init__(self, updates: Sequence[LowRank], tile_bytes: int = TILE_BYTES) -> None:
        self.updates = updates
        self.shape = updates[0].shape
        self.tile_bytes = tile_bytes

    def __len__(self) -> int:
        return len(self.updates)

    def merge(self, rule: Callable[[Tensor], Tensor]) -> Tensor:
        """The dense result (out, in) of `rule`, which turns a block (n, rows, in) into its merged rows (rows, in)."""
        out_features, in_features = self.shape
        result = self.updates[0].B.new_empty(out_features, in_features)
        for rows in self._blocks():
            block = result.new_empty(len(self), rows.stop - rows.start, in_features)
            for update, delta in zip(self.updates, block, strict=True):
                torch.mm(update.B[rows], update.A, out=delta)
            result[rows] = rule(block)
        return result

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
                above += int((block > high).sum())
                inside.append(block[(block >= low) & (block <= high)])
            collected = torch.cat(inside)
            if above < k <= above + len(collected):
                # kthvalue counts from the smallest.
                return torch.kthvalue(collected, len(collected) - (k - above) + 1).values
            low, high = (high, float("inf")) if k <= above else (0.0, low)

    def _bracket(self, i: int, density: float) -> tuple[float, float]:
        update, (out_features, in_features) = self.updates[i], self.shape
        count = min(out_features, max(1, _SAMPLE // in_features))
        rows = torch.linspace(0, out_features - 1, count, device=update.B.device).long()
        sample = (update.B[rows] @ update.A).abs().flatten()
        middle, spread = (1 - density) * len(sample), 0.02 * len(sample) + 8
        low, high = int(middle - spread), int(middle + spread)
        return (
            float(torch.kthvalue(sample, low).values) if low > 0 else 0.0,
            float(torch.kthvalue(sample, high).values) if high <= len(sample) else float("inf"),
        )

    def _magnitudes(self, i: int) -> Iterator[Tensor]:
        update = self.updates[i]
        # The blocks of `merge`: another height could round an entry at the threshold the other way.
        for rows in self._blocks():
            yield (update.B[rows] @ update.A).abs_()

    def _blocks(self) -> Iterator[slice]:
        out_features, in_features = self.shape
        height = max(1, self.tile_bytes // (len(self) * in_features * self.updates[0].B.element_size()))
        for start in range(0, out_features, height):
            yield slice(start, min(start + height, out_features))
