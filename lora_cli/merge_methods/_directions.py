"""Shared parts of the methods on the unit sphere: updates as directions, and their way back to coefficients."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_cli.errors import Refused

# A sum of directions below this fraction of its terms is rounding noise.
_CANCELLED = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class Directions:
    """n updates as unit vectors u_i = sgn(w_i) ΔW_i / ‖ΔW_i‖; an update of zero has u_i = 0. All float64 on the CPU.

    cosines: ⟨u_i, u_j⟩, (n, n).
    inverse: sgn(w_i) / ‖ΔW_i‖, the factor from the update to u_i, (n,).
    shares: |w_i| / Σ |w| among the updates that are not zero, (n,).
    length: Σ |w_i| ‖ΔW_i‖, the norm for a mean of weighted directions.
    """

    cosines: Tensor
    inverse: Tensor
    shares: Tensor
    length: Tensor

    @classmethod
    def of(cls, products: Tensor, weights: Tensor) -> "Directions":
        """From all inner products of the updates, (n, n), and the weights, (n,)."""
        norms = products.diagonal().clamp(min=0).sqrt()
        moves = norms > 0
        inverse = weights.sign() * torch.where(moves, 1 / torch.where(moves, norms, 1), 0)
        shares = torch.where(moves, weights.abs(), 0)
        return cls(
            cosines=inverse[:, None] * products * inverse,
            inverse=inverse,
            shares=shares / (shares.sum() if shares.any() else 1),
            length=weights.abs() @ norms,
        )

    def normalised(self, mixture: Tensor) -> Tensor:
        """The mixture Σ x_i u_i, (n,), at norm 1.

        Raises:
            Refused: the directions cancel each other.
        """
        norm = (mixture @ self.cosines @ mixture).clamp(min=0).sqrt()
        if norm <= _CANCELLED * mixture.abs().sum():
            raise Refused(
                "the weighted directions of the updates cancel each other, so they have no mean direction",
                hint="change the weights, or use --method linear",
            )
        return mixture / norm
