"""The leading directions of a dense update, by a randomised block Krylov method (Musco and Musco, arXiv 1504.05477)."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

OVERSAMPLED = 10
"""Directions that a block has beyond those that are wanted."""
# The most times that a block is made orthogonal to those before it: two are the rule.
_PASSES = 5


class Krylov(NamedTuple):
    """Orthonormal directions `basis` (out, m) of an update Δ, `rows` = basisᵀΔ (m, in), and rows·rowsᵀ in float64."""

    basis: Tensor
    rows: Tensor
    gram: Tensor

    def leading(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """The k leading singular triplets of the projection, U (out, k), s (k,) descending and V (in, k)."""
        if self.rows.dtype == torch.float64:
            u, s, vh = torch.linalg.svd(self.rows, full_matrices=False)
            return self.basis @ u[:, :k], s[:k], vh[:k].T
        # By the Gram matrix, six times as quick: in float64 it resolves all that float32 holds.
        squares, u = torch.linalg.eigh(self.gram)
        s, u = squares.flip(0)[:k].clamp(min=0).sqrt(), u.flip(1)[:, :k]
        v = self.rows.double().T @ (u / torch.where(s > 0, s, 1))
        dtype = self.rows.dtype
        return self.basis @ u.to(dtype), s.to(dtype), v.to(dtype)


def blocks(delta: Tensor, width: int, *, seed: int = 0) -> Iterator[Krylov]:
    """Directions of a dense update Δ (out, in): `width` random ones of its columns, then the last times ΔΔᵀ, and so on.

    Each item holds those of all blocks so far. Ends before they would be more than a side has.

    Cost: 4·out·in·width operations a block.
    """
    out, into = delta.shape
    generator = torch.Generator(delta.device).manual_seed(seed)
    block = delta @ torch.randn(into, width, generator=generator, dtype=delta.dtype, device=delta.device)
    basis, rows = delta.new_empty(out, 0), delta.new_empty(0, into)
    gram = delta.new_empty(0, 0, dtype=torch.float64)
    while basis.shape[1] + width <= min(out, into):
        new = _orthonormal(block, basis)
        seen = new.T @ delta
        basis, rows = torch.cat([basis, new], dim=1), torch.cat([rows, seen])
        products = rows.double() @ seen.T.double()  # (m, width)
        before = len(gram)
        gram = torch.cat([torch.cat([gram, products[:before]], dim=1), products.T])
        yield Krylov(basis, rows, gram)
        block = delta @ _in_range(seen).T


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
    return torch.ldexp(block, -block.abs().max().frexp().exponent)
