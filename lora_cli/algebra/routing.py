"""Routing: each token gets its own shares of several updates of one module, from its place among their directions.

y = W₀x + Σ_i g_i(x) ΔW_i x with g(x) = softmax(score(x) / T) over the updates of the module. Each update is held by its
singular directions, ΔW_i = U_i Σ_i V_iᵀ, so that the projections V_iᵀx serve the scores and the output alike.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_cli.algebra.lowrank import LowRank
from lora_cli.algebra.spectra import compact


@dataclass(frozen=True, slots=True, eq=False)
class Experts:
    """n updates of one module side by side, R directions in all: `A` (R, in) are right singular vectors, the strongest
    of each update first, `B` (out, R) left ones times their singular values `s` (R,).

    `owner` (R,) is the update of each direction, `first` (n,) the strongest direction of each update.
    """

    A: Tensor
    B: Tensor
    s: Tensor
    owner: Tensor
    first: Tensor

    @classmethod
    def of(cls, updates: Sequence[LowRank]) -> "Experts | None":
        """In float64. An update that is zero has no directions and is left out; None if all are."""
        found = [one for one in map(compact, updates) if one.s.numel()]
        if not found:
            return None
        ranks = torch.tensor([one.s.numel() for one in found])
        return cls(
            A=torch.cat([one.V.T for one in found]),
            B=torch.cat([one.U * one.s for one in found], dim=1),
            s=torch.cat([one.s for one in found]),
            owner=torch.arange(len(found)).repeat_interleave(ranks),
            first=ranks.cumsum(0) - ranks,
        )

    def to(self, device: torch.device, dtype: torch.dtype) -> "Experts":
        """The same on a device, A and B in a precision, singular values in float32 at least."""
        exact = torch.promote_types(dtype, torch.float32)
        return Experts(
            self.A.to(device, dtype),
            self.B.to(device, dtype),
            self.s.to(device, exact),
            self.owner.to(device),
            self.first.to(device),
        )

    def output(self, projections: Tensor, routing: "Routing") -> Tensor:
        """Σ_i g_i(x) ΔW_i x (tokens, out) from the projections A x (tokens, R)."""
        shares = routing.shares(self, projections.to(self.s.dtype))
        return (projections * shares[:, self.owner].to(projections.dtype)) @ self.B.T


Score = Callable[[Experts, Tensor], Tensor]
"""Called as score(experts, projections), the latter (tokens, R); returns (tokens, n), one score per update."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """How tokens choose among updates: softmax of score / temperature over the `top_k` highest scores, 0 for all.

    Scores as high as the last of these count too.
    """

    score: Score
    temperature: float
    top_k: int

    def shares(self, experts: Experts, projections: Tensor) -> Tensor:
        """The shares (tokens, n) of the updates for projections (tokens, R); each row sums to 1."""
        scores = self.score(experts, projections)
        if 0 < self.top_k < scores.shape[1]:
            least = scores.topk(self.top_k, dim=1).values[:, -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        return (scores / self.temperature).softmax(dim=1)


def along_the_strongest(experts: Experts, projections: Tensor) -> Tensor:
    """|v_i · x|, with the strongest right singular vector v_i of each update."""
    return projections[:, experts.first].abs()


def length_of_output(experts: Experts, projections: Tensor) -> Tensor:
    """‖ΔW_i x‖ = ‖Σ_i V_iᵀ x‖ of each update."""
    squares = (projections * experts.s).square()
    return squares.new_zeros(len(squares), len(experts.first)).index_add_(1, experts.owner, squares).sqrt()
