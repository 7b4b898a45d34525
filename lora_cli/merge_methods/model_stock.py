"""Model Stock: the mean of fine-tunes of one task, shrunk towards the base by their disagreement."""

from typing import Annotated, Literal

import torch
from torch import Tensor

from lora_cli.algebra.updates import Updates
from lora_cli.merge_methods._directions import Directions
from lora_cli.methods import Knob, method


@method("coefficients")
def model_stock(
    updates: Updates,
    weights: Tensor,
    *,
    per: Annotated[Literal["module", "adapter"], Knob("measure per module or over the whole adapter")] = "module",
) -> Tensor:
    """Mean of fine-tunes of one task, shrunk towards the base by their disagreement.

    ΔW = t Σ w_i ΔW_i with t = N c̄ / (1 + (N − 1) c̄), where c̄ is the mean cosine of all pairs, at least 0. With
    different weights a pair counts |w_i w_j|, its cosine is that of sgn(w_i) ΔW_i and sgn(w_j) ΔW_j, and N = (Σ |w|)² /
    Σ w²; then t = c̄ / ‖Σ p_i u_i‖², u_i the unit vectors of these and p_i = |w_i| / Σ |w|. t lies in 0 … 1: copies and
    a single adapter have t = 1, orthogonal or opposed ones t = 0. Updates of zero are left out of N and c̄. With --per
    adapter norms and cosines are those of the whole updates, and all modules get the same c.

    Weights: shares of the mean; a negative one flips the update's sign. Twice the weights give twice the result.

    Cost: O(R² (out + in)) for all inner products.

    Use: for several fine-tunes of one task from one start (seeds, folds). It does not suit a pool: adapters of
    different origin are nearly orthogonal, and the merge collapses to the base. At c̄ = 0.0006 and N = 6, t is 0.003;
    at c̄ = 0.02 and N = 30 it is 0.38. Compare the norm that `lora merge` reports with the adapters' mean norm, or use
    norm-matched, which does the opposite.

    Source: Jang et al. 2024, arXiv 2403.19522, with equal weights and updates of nearly one norm. Weights and
    the bound at 0 are ours; in mergekit t is negative where c̄ is.
    """
    directions = Directions.of(updates.gram(per), weights)
    p = directions.shares
    own = p.square().sum()
    if own == 0:
        return weights
    squared = p @ directions.cosines @ p
    # One adapter has no pairs, so it agrees.
    agreement = (squared - own) / (1 - own) if own < 1 - 1e-12 else torch.ones_like(own)
    return weights * (agreement / squared).clamp(0, 1) if agreement > 0 else weights * 0.0
