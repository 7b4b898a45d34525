"""Iso-CTS: a flat spectrum over common and task-specific directions."""

from typing import Annotated

import torch
from torch import Tensor

from lora_cli.algebra.lowrank import LowRank, Spectrum
from lora_cli.algebra.spectra import NOISE, Space, compact, counted, polar
from lora_cli.algebra.updates import Updates
from lora_cli.methods import Knob, method


@method("spectral", weights="sum")
def iso_cts(
    updates: Updates,
    weights: Tensor,
    *,
    common: Annotated[float, Knob("share of the directions that is taken from the sum", low=0, high=1)] = 0.8,
) -> LowRank:
    """As iso-c, with the sum's weakest directions replaced by directions of the single adapters.

    With D the numerical rank of Σ w_i ΔW_i and N adapters, every adapter gets k_t = round((D − ⌊common · D⌋) / N)
    directions, at most ⌊D / N⌋, and the sum keeps its leading k_c = D − N k_t, U_c S_c V_cᵀ. Of (I − U_c U_cᵀ) w_i ΔW_i
    the leading k_t singular triplets are taken, if they exceed 1e-5 of the adapter's norm. Side by
    side, U (out, k), V (in, k): ΔW = σ̄ P(U) P(V)ᵀ, σ̄ the mean of all k singular values, P the nearest orthonormal
    columns as in tsv. At k_t = 0, with more than twice as many adapters as directions to give, it is iso-c. An update
    of zero counts as absent.

    Weights: as in `linear` for the sum; in an adapter's own directions only σ̄ and their sign depend on them.

    Cost: O(R² (out + in) + R³), float64, without the dense update.

    Use: as iso-c, for adapters of different sizes: the sum's last directions rarely belong to the small ones. Where k_c
    or k_t falls between equal singular values, the choice is arbitrary.

    Source: Marczak et al. 2025, arXiv 2502.04959, with D the numerical rank in place of min(out, in), as in iso-c, and
    with a P that does not fail on directions shared by several adapters. The projection on the left alone is the
    paper's.
    """
    kept, w = counted(updates, weights)
    space = Space.of([compact(update) for update in kept])
    together = space.sum(w.tolist())
    moving = [item.scaled(factor) for item, factor in zip(space.items, w.tolist(), strict=True) if item.rank]
    D, N = together.s.numel(), max(1, len(moving))
    k_t = min(round((D - int(common * D)) / N), D // N)
    k_c = D - N * k_t
    parts = [Spectrum(together.U[:, :k_c], together.s[:k_c], together.V[:, :k_c])]
    for item in moving if k_t else ():
        besides = LowRank(item.B - parts[0].U @ (parts[0].U.T @ item.B), item.A)
        own = compact(besides, floor=NOISE * float(item.norm()))
        parts.append(Spectrum(own.U[:, :k_t], own.s[:k_t], own.V[:, :k_t]))
    s = torch.cat([part.s for part in parts])
    U, V = polar(torch.cat([part.U for part in parts], dim=1)), polar(torch.cat([part.V for part in parts], dim=1))
    return space.outside(Spectrum(U, s.mean().expand_as(s), V)).to(kept[0].B.dtype)
