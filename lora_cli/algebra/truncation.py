"""The best approximation of a dense update by a lower rank, randomised, with a remainder that is measured."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_cli.algebra.krylov import SMALL, Gains, blocks, width_for
from lora_cli.algebra.lowrank import LowRank, Spectrum, squared_norm

# Remainders below this share of the squared norm are rounding noise themselves.
_NOISE = 1e-13
_ROWS = 1 << 22


@dataclass(frozen=True, slots=True, eq=False)
class Truncated:
    """Leading directions of an update, its squared Frobenius norm (`total`), and that of what they leave (`rest`)."""

    spectrum: Spectrum
    total: float
    rest: float

    def remainder(self, rank: int) -> float:
        """The squared norm of what the approximation of this rank leaves."""
        return self.rest + float(self.spectrum.s[rank:].double().square().sum())

    def at(self, rank: int) -> LowRank:
        """The approximation of this rank, with balanced factors."""
        return self.spectrum.truncated(rank)

    def rank_for(self, energy: float) -> int:
        """The lowest rank that keeps this share of the squared norm; one more than all if none does."""
        tail = self.spectrum.s.double().square().flip(0).cumsum(0).flip(0) + self.rest  # left at rank 0, 1, …
        return int((tail > (1 - energy) * self.total).sum()) + int(self.rest > (1 - energy) * self.total)


def truncate(delta: Tensor, rank: int, *, seed: int = 0) -> Truncated:
    """The `rank` leading singular directions of a dense fp32 update (out, in).

    Blocks of `krylov.blocks`, at least rank + 10 wide, until `Gains` tells that more would not help. The norm of the
    remainder is then within 0.1 % of the smallest possible one, as tests against dense SVD show for flat and for
    steep spectra. It is measured: the directions are orthonormal, so that it is what the projection on them leaves.
    Where the blocks would span half of a side, the SVD is dense and exact.

    Cost: 4·out·in·(rank + 10) operations a block, of which two to six are needed. Memory: the update, and the blocks.
    """
    total, side = squared_norm(delta), min(delta.shape)
    gains = Gains()
    for found in blocks(delta, min(width_for(rank), side), seed=seed):
        if 2 * found.basis.shape[1] > side:
            break
        squared = torch.linalg.eigvalsh(found.gram)
        rest = total - float(squared.sum())
        if rest < SMALL * total:
            rest = _left(delta, found.basis, found.rows)
        left = rest + float(squared[:-rank].clamp(min=0).sum())
        if left <= _NOISE * total or gains.enough(left):
            return Truncated(Spectrum(*found.leading(rank)), total, left)
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    return Truncated(Spectrum(u, s, vh.T), total, 0.0)


def _left(delta: Tensor, basis: Tensor, projected: Tensor) -> float:
    """The squared norm of Δ less its projection, a block of rows at a time."""
    height = max(1, _ROWS // max(1, delta.shape[1]))
    left = 0.0
    for at in range(0, len(delta), height):
        rows = slice(at, at + height)
        left += float((delta[rows] - basis[rows] @ projected).double().square().sum())
    return left
