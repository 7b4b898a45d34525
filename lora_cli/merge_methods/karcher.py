"""Karcher mean: the direction with the least squared angles to all adapters, at their mean norm."""

from typing import Annotated, Literal

import torch
from torch import Tensor

from lora_cli.algebra.updates import Updates
from lora_cli.errors import Refused
from lora_cli.merge_methods._directions import Directions
from lora_cli.methods import Knob, method

_ROUNDS = 1000
_CONVERGED = 1e-12
# Past this angle, 178 degrees, the direction from the mean to the update is not unique.
_OPPOSITE = -0.9995


@method("coefficients")
def karcher(
    updates: Updates,
    weights: Tensor,
    *,
    per: Annotated[Literal["module", "adapter"], Knob("measure per module or over the whole adapter")] = "module",
) -> Tensor:
    """Mean on the sphere of the updates' directions, at their mean norm.

    With unit vectors u_i = sgn(w_i) ΔW_i / ‖ΔW_i‖, shares p_i = |w_i| / Σ |w| and θ_i the angle between u_i and u:
    ΔW = Σ |w_i| ‖ΔW_i‖ · u, where u minimises Σ p_i θ_i² from u ∝ Σ p_i u_i on. There Σ p_i (θ_i / sin θ_i) (u_i −
    cos θ_i u) = 0, hence the iteration u ← Σ p_i (θ_i / sin θ_i) u_i at norm 1, all of it among the n coefficients.
    Updates of zero have no direction and no share. Three cases are refused: directions that cancel (Σ p_i u_i = 0), an
    update within 2 degrees of the opposite of the mean, and no convergence in a thousand rounds.
    With --per adapter norms and cosines are those of the whole updates, and all modules get the same c.

    Weights: shares of the direction and of the norm, by size; a negative one flips the update's sign. Twice the
    weights give twice the result.

    Cost: O(R² (out + in)) for all inner products, O(n²) a round; 10 rounds for 300 unrelated adapters, up to
    100 where angles are obtuse.

    Use: as multislerp, by angles in place of chords: an outlier pulls more. Of two adapters it is the point on their
    great circle that the weights name, at their mean norm, which slerp leaves where norms differ. Among many unrelated
    adapters it and multislerp are nearly the same.

    Source: Karcher 1977; mergekit's karcher (arXiv 2603.04972), equal weights, which moves along the sphere by Σ p_i
    (θ_i / sin θ_i) (u_i − cos θ_i u) ten times or until that is below 1e-5. The zero is the same. That step converges
    slowly for nearly orthogonal adapters of different weights (200 rounds for 300), so this method uses another, until
    convergence. Where the directions cancel, mergekit starts at the first adapter.
    """
    directions = Directions.of(updates.gram(per), weights)
    if directions.length == 0:
        return torch.zeros_like(weights)
    mean = directions.normalised(directions.shares)
    for _ in range(_ROUNDS):
        before = mean
        mean = directions.normalised(directions.shares * _stretch(directions.cosines @ mean, directions.shares > 0))
        if (mean - before).abs().max() <= _CONVERGED * mean.abs().max():
            return directions.length * mean * directions.inverse
    raise Refused("the updates' directions are too far apart for a mean", hint="use --method multislerp or linear")


def _stretch(cosines: Tensor, counted: Tensor) -> Tensor:
    """θ / sin θ of each angle, (n,), 1 at θ = 0."""
    if bool((cosines[counted] < _OPPOSITE).any()):
        raise Refused(
            "an update points away from the mean of all: no one direction lies between them",
            hint="change the weights, or use --method linear",
        )
    # For small angles the quotient is 1 + θ²/6; arccos loses those digits.
    near = cosines > 1 - 1e-8
    safe = torch.where(near | ~counted, 0, cosines.clamp(-1, 1))
    return torch.where(near, 1 + (1 - cosines) / 3, torch.arccos(safe) / (1 - safe.square()).sqrt())
