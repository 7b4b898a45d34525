"""SCE: select, calculate, erase."""

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from lora_cli.algebra.kernels import largest, squares
from lora_cli.algebra.tiles import Ballot, Block, DeltaTiles
from lora_cli.methods import Knob, method

# Standard deviations below this many units of rounding of a row's largest mean count as zero.
_NOISE = 64


@method("elementwise", weights="sum")
def sce(
    deltas: DeltaTiles,
    weights: Tensor,
    *,
    density: Annotated[float, Knob("share of each update's entries that is kept", above=0, high=1)] = 0.5,
) -> Tensor:
    """Keep the entries on which the adapters differ most, weigh adapters by their energy there, drop minority signs.

    With τ_i = w_i ΔW_i (out, in). Select: the mask S keeps the entries whose variance over the n adapters reaches the
    k-th largest, k = round(density · out · in); equal ones at the border all stay, and variances within rounding
    noise are 0. Under --missing zero the n count adapters that lack the module. Calculate: e_i = ‖S ∘ τ_i‖².
    Erase: γ = sgn Σ τ_i; a sum of zero elects no sign. ΔW = S ∘ Σ e_i τ_i / Σ e_i over the adapters with sgn τ_i = γ.

    Weights: factors on the updates, applied first, so that twice the weights give twice the result. An adapter of
    weight 0 is left out.

    Cost: O(R · out · in), three times, once at density 1. Memory holds the result, the variances and a mask of bytes.
    Variances of copies are all zero: every entry ties, and copies come back unchanged.

    Use: for adapters of one kind of task. Energies grow with the square of the norm: an adapter of ten times the norm
    decides nearly alone.

    Source: Wan et al. 2024 (FuseChat), arXiv 2408.07990, per module. In the paper a sum of zero elects +.
    """
    norms = weights.abs() * torch.stack([update.norm().cpu() for update in deltas.updates])
    # Variances and energies are squares: scaling updates to about norm 1 avoids underflow and overflow.
    size = float(norms.max()) or 1.0
    scales = (weights / size).tolist()
    selected = _selected(deltas, scales, density) if density < 1 else None
    shares = (norms / size).square().tolist()
    if selected is not None:
        energies = deltas.each(
            lambda block: [
                squares(tile.mul_(scale).mul_(selected[block.rows])) for tile, scale in zip(block, scales, strict=True)
            ]
        )
        shares = torch.tensor(energies, dtype=torch.float64).sum(0).tolist()

    def erase_and_average(block: Block) -> Tensor:
        ballot = Ballot(block, "plain")
        for tile, weight, share in zip(block, scales, shares, strict=True):
            ballot.cast(tile.mul_(weight), share)
        mean = ballot.mean().mul_(size)
        return mean if selected is None else mean.mul_(selected[block.rows])

    return deltas.merge(erase_and_average)


def _selected(deltas: DeltaTiles, scales: Sequence[float], density: float) -> Tensor:
    """Where the scaled updates differ most, (out, in) bool."""
    zeros = sum(weight != 0 for weight in deltas.updates.absent)
    variance = deltas.merge(lambda block: _variance(block, scales, zeros))
    return variance >= largest(variance.view(-1), max(1, round(density * variance.numel())))


def _variance(block: Block, scales: Sequence[float], zeros: int) -> Tensor:
    """n times the population variance of the scaled updates, without the cancellation in Σx² - (Σx)²/n.

    Updates of scale 0 are left out; `zeros` further updates that are zero everywhere count.
    """
    mean, total, seen = block.zeros(), block.zeros(), 0
    for tile, scale in zip(block, scales, strict=True):
        if scale:
            seen += 1
            step = tile.mul_(scale) - mean
            mean.add_(step, alpha=1 / seen)
            total.add_(step.mul_(tile.sub_(mean)))
    squares = mean.square_()
    # The rounding of an entry is relative to the largest of its row.
    noise = squares.amax(1, keepdim=True) * (seen * (_NOISE * torch.finfo(mean.dtype).eps) ** 2)
    total.add_(squares, alpha=seen * zeros / max(1, seen + zeros))
    return total.masked_fill_(total <= noise, 0)
