"""Multi-SLERP: the mean direction of any number of adapters, at their mean norm."""

from typing import Annotated, Literal

import torch
from torch import Tensor

from lora_cli.algebra.updates import Updates
from lora_cli.merge_methods._directions import Directions
from lora_cli.methods import Knob, method


@method("coefficients")
def multislerp(
    updates: Updates,
    weights: Tensor,
    *,
    per: Annotated[Literal["module", "adapter"], Knob("measure per module or over the whole adapter")] = "module",
) -> Tensor:
    """Mean of the updates' directions, at their mean norm.

    With unit vectors u_i = sgn(w_i) ΔW_i / ‖ΔW_i‖ and shares p_i = |w_i| / Σ |w|:
    ΔW = Σ |w_i| ‖ΔW_i‖ · m / ‖m‖ where m = Σ p_i u_i. Updates of zero have no direction and no share. Directions that
    cancel (‖m‖ = 0) are refused.
    With --per adapter norms and cosines are those of the whole updates, and all modules get the same c.

    Weights: shares of the direction and of the norm, by size; a negative one flips the update's sign. Twice the
    weights give twice the result.

    Cost: O(R² (out + in)) for all inner products.

    Use: where adapters of very different norms should count alike; in norm-matched the large ones dominate. With equal
    norms the two differ only where updates cancel. karcher weighs by angles in place of chords.

    Source: mergekit's multislerp, which adds a step along the sphere from m / ‖m‖ by v = Σ p_i (u_i − ⟨u_i, m⟩ m /
    ‖m‖²). With the same shares in both sums v is zero, so the step changes nothing. mergekit divides by Σ w, so that
    negative weights reduce the norm.
    """
    directions = Directions.of(updates.gram(per), weights)
    if directions.length == 0:
        return torch.zeros_like(weights)
    return directions.length * directions.normalised(directions.shares) * directions.inverse
