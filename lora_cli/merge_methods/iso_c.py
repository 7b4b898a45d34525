"""Iso-C: the sum with a flat spectrum."""

from dataclasses import replace

from torch import Tensor

from lora_cli.algebra.lowrank import LowRank
from lora_cli.algebra.spectra import Space, compact
from lora_cli.algebra.updates import Updates
from lora_cli.methods import method


@method("spectral", weights="sum")
def iso_c(updates: Updates, weights: Tensor) -> LowRank:
    """Sum of the updates with all its singular values set to their mean.

    Σ w_i ΔW_i = U S Vᵀ with the ρ singular values above 1e-5 of the largest, ρ ≤ R; ΔW = σ̄ U Vᵀ, σ̄ = Σ σ / ρ.
    The result jumps where a singular value crosses that border, because each direction counts as much as any other.

    Weights: as in `linear`; twice the weights give twice the result.

    Cost: O(R² (out + in) + R³), float64, without the dense update.

    Use: where a few directions dominate, most of all with many adapters that share them. It changes a single adapter,
    and N copies come back flat, N times as large. The weakest directions become as strong as the strongest: it does not
    suit adapters of high nominal rank that use little of it. `--lambda` sets the size of the result.

    Source: Marczak et al. 2025, arXiv 2502.04959, whose code takes the mean over min(out, in) values and fills
    directions that no adapter has: nearly all of the result for rank 16 × 4 in 1024. This method stays on the numerical
    rank, as in core space (arXiv 2509.17786).
    """
    space = Space.of([compact(update) for update in updates])
    found = space.sum(weights.tolist())
    return space.outside(replace(found, s=found.s.mean().expand_as(found.s))).to(updates[0].B.dtype)
