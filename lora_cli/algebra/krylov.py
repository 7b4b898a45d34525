"""The leading directions of a dense update, by a randomised block Krylov method (Musco and Musco, arXiv 1504.05477)."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Directions that a block has at least beyond those that are wanted.
_OVERSAMPLED = 10
# Matrix products with a multiple of so many columns are a third quicker.
_COLUMNS = 16
# The most times that a block is made orthogonal to those before it: two are the rule.
_PASSES = 5
SMALL = 1e-4
"""Below this share of the squared norm, the difference of two sums is rounding noise of fp32."""
# Blocks that would lower the squared remainder by less than this share in all are left out.
_GAIN = 4e-4


class Krylov(NamedTuple):
    """Orthonormal directions `basis` (out, m) of an update Δ, and basisᵀΔ (m, in) in `parts` from above to below.

    `gram` are the products of its rows (m, m): float64, or fp32 of an update in bfloat16.
    """

    basis: Tensor
    parts: tuple[Tensor, ...]
    gram: Tensor

    @property
    def rows(self) -> Tensor:
        """basisᵀΔ (m, in)."""
        return torch.cat(self.parts)

    @classmethod
    def on(cls, basis: Tensor, delta: Tensor) -> "Krylov":
        """The projection of an update (out, in) on orthonormal directions (out, m)."""
        rows = basis.T @ delta
        wide = rows.double()
        return cls(basis, (rows,), wide @ wide.T)

    def leading(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """The k leading singular triplets of the projection, U (out, k), s (k,) descending and V (in, k)."""
        rows = self.rows
        if rows.dtype == torch.float64:
            u, s, vh = torch.linalg.svd(rows, full_matrices=False)
            return self.basis @ u[:, :k], s[:k], vh[:k].T
        # By the Gram matrix, six times as quick: in float64 it resolves all that float32 holds.
        squares, u = torch.linalg.eigh(self.gram)
        s, u = squares.flip(0)[:k].clamp(min=0).sqrt(), u.flip(1)[:, :k]
        vh = (u / torch.where(s > 0, s, 1)).T @ rows.double()  # from the left: four times as quick
        return self.basis @ u.to(rows.dtype), s.to(rows.dtype), vh.to(rows.dtype).T

    def narrowed(self, k: int) -> Tensor:
        """The k leading left singular directions of the projection, (out, k)."""
        leading: Tensor = torch.linalg.eigh(self.gram)[1][:, -k:]
        return self.basis @ leading.to(self.basis.dtype)


class Gains:
    """Tells, from what the blocks leave, when more of them would gain next to nothing."""

    def __init__(self) -> None:
        self._left = self._gain = math.inf
        self._fall = 1.0

    def enough(self, left: float) -> bool:
        """Whether the last block gained less than 0.04 % of the squared remainder, or the next ones will gain half of
        that, if gains fall by the slower of the last two steps.

        The faster step may be the last of some strong directions, after which weak ones are still sought.

        Args:
            left: the squared remainder after that block, of the rank that is wanted.
        """
        gain = self._left - left
        fall = gain / self._gain if self._gain < math.inf else 1.0
        slower = max(fall, self._fall)
        to_come = gain * slower / (1 - slower) if slower < 1 else math.inf
        self._left, self._gain, self._fall = left, gain, fall
        return min(gain, 2 * to_come) <= _GAIN * left


def width_for(k: int) -> int:
    """The directions of a block for k that are wanted."""
    return -(-(k + _OVERSAMPLED) // _COLUMNS) * _COLUMNS


def blocks(delta: Tensor, width: int, *, seed: int = 0) -> Iterator[Krylov]:
    """Directions of a dense update Δ (out, in): `width` random ones of its columns, then the last times ΔΔᵀ, and so on.

    Each item holds those of all blocks so far. Ends before they would be more than a side has. Of an update in
    bfloat16 the directions are in fp32, and their products as precise as such an update's.

    Cost: 4·out·in·width operations a block, and those on the basis, which are fewer where out is the shorter side.
    """
    (out, into), dtype = delta.shape, torch.promote_types(delta.dtype, torch.float32)
    generator = torch.Generator(delta.device).manual_seed(seed)
    start = torch.randn(into, width, generator=generator, dtype=dtype, device=delta.device)
    block = _times(delta, start.to(delta.dtype))
    precise = torch.float32 if delta.dtype == torch.bfloat16 else torch.float64
    basis, gram = delta.new_empty(out, 0, dtype=dtype), delta.new_empty(0, 0, dtype=precise)
    parts: tuple[Tensor, ...] = ()
    while basis.shape[1] + width <= min(out, into):
        new = _orthonormal(block.to(dtype), basis)
        seen = _times(delta.T, new.to(delta.dtype)).T
        basis, parts = torch.cat([basis, new], dim=1), (*parts, seen.to(dtype))
        products = torch.cat([part.to(precise) @ seen.T.to(precise) for part in parts])  # (m, width)
        before = len(gram)
        gram = torch.cat([torch.cat([gram, products[:before]], dim=1), products.T])
        yield Krylov(basis, parts, gram)
        block = _times(delta, _in_range(seen).T)


def _times(delta: Tensor, block: Tensor) -> Tensor:
    """The product of an update and a block, (out, in) and (in, width), along the rows in which the update is stored."""
    return delta @ block if delta.is_contiguous() else (block.T @ delta.T).T


def _orthonormal(block: Tensor, basis: Tensor) -> Tensor:
    """An orthonormal basis of a block's directions that are not in `basis`, as orthogonal to it as its dtype can tell.

    In fp32 that takes two passes, and more where the block holds hardly anything new.
    """
    block = _in_range(block)
    for passed in range(_PASSES):
        overlap = basis.T @ block
        if passed and float(overlap.norm()) <= torch.finfo(block.dtype).eps * overlap.numel() ** 0.5:
            break
        block = torch.linalg.qr(block - basis @ overlap)[0]
    return block


def _in_range(block: Tensor) -> Tensor:
    """The block by a power of two, which rounds nothing: the squares of what is large or small leave fp32's range."""
    return block * 2.0 ** -int(block.abs().max().frexp().exponent)
