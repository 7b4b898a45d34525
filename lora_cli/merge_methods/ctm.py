"""CtM: compress all adapters to one small space, then merge there."""

from typing import Annotated

import torch
from torch import Tensor

from lora_cli.algebra.lowrank import LowRank, Spectrum
from lora_cli.algebra.spectra import Inside, Space, compact, counted, merged_inside, signs
from lora_cli.algebra.updates import Updates
from lora_cli.methods import Knob, method

_ROUNDS = 1000
_SETTLED = 1e-8


@method("space", inside=("ties", "linear", "iso-c", "tsv"))
def ctm(
    updates: Updates,
    weights: Tensor,
    inside: Inside,
    *,
    compress_to: Annotated[int, Knob("rank of the space that all adapters are compressed to", low=1)] = 16,
    beta: Annotated[
        float,
        Knob(
            "0: all adapters count equally in finding the space, 1: in proportion to their squared norm", low=0, high=1
        ),
    ] = 0.25,
) -> LowRank:
    """Merge in the small space that holds most of all updates, by the method of --inside.

    Orthonormal U (out, k) and V (in, l) maximise Σ c_i² ‖Uᵀ ΔW_i V‖², c_i = β + (1 − β) n̄ / ‖ΔW_i‖ with n̄ the mean
    norm of the updates that are not zero. k and l are compress_to, or the number of directions of all updates together
    on that side, if that is less. At β = 0 all adapters count alike, at β = 1 by their squared norms. The method inside
    merges the Uᵀ ΔW_i V, (k, l), of the unscaled updates; ΔW = U · merged · Vᵀ has rank compress_to at most, so that a
    later reduction to it changes nothing.

    V starts from the leading right singular vectors of the stacked updates; U, then V, comes from an SVD with the other
    fixed. Each round then improves one with the other fixed, U ← orth(S_V U), S_V = Σ c_i² ΔW_i V Vᵀ ΔW_iᵀ, until a
    round adds less than 1e-8 of the sum, 1000 rounds at most. The sum never falls and converges to a maximum, perhaps a
    local one. U and V are in singular order, the entry of largest magnitude in each column positive; equal singular
    values leave a choice. Adapters of weight 0 do not contribute.

    Weights: as in the method inside; they do not affect the choice of the space. Give `--weights sum` for tsv and
    iso-c.

    Cost: O(R² (out + in) + R³ + rounds · R² k), float64; 10 to 100 rounds, several hundred for unrelated adapters with
    flat spectra.

    Use: for one adapter of rank k from many. It keeps more of every single adapter than a merge that is reduced to rank
    k afterwards, and is further from their mean. If --rank is below compress_to, the result is reduced once more.

    Source: Compress-then-Merge 2026, arXiv 2606.03723: partial Tucker decomposition by alternating SVDs (tolerance
    1e-6); ours takes one step of subspace iteration in place of each SVD, with the same fixed points.
    """
    kept, w = counted(updates, weights)
    spectra = [compact(update) for update in kept]
    norms = [float(one.s.norm()) for one in spectra]
    moving = [norm for norm in norms if norm]
    emphasis = [beta + (1 - beta) * sum(moving) / len(moving) / norm if norm else 1.0 for norm in norms]
    space = Space.of([Spectrum(one.U, one.s * c, one.V) for one, c in zip(spectra, emphasis, strict=True)])
    U, V = _shared(space, compress_to)
    images = [LowRank((U.T @ one.B) / c, one.A @ V) for one, c in zip(space.items, emphasis, strict=True)]
    return merged_inside(inside, kept, w, images, space.U @ U, space.V @ V)


def _shared(space: Space, most: int) -> tuple[Tensor, Tensor]:
    """Orthonormal U (k, p) and V (l, q) between which most of a k × l space's items M_i = B_i A_i lies; p, q ≤ most."""
    p, q = min(most, space.U.shape[1]), min(most, space.V.shape[1])
    B, A = torch.cat([one.B for one in space.items], dim=1), torch.cat([one.A for one in space.items])  # (k, R), (R, l)
    ranks = [one.rank for one in space.items]
    owner = torch.arange(len(ranks)).repeat_interleave(torch.tensor(ranks))
    place = torch.cat([torch.arange(rank) for rank in ranks])

    def by_adapter(X: Tensor) -> Tensor:
        padded = X.new_zeros(len(ranks), max(ranks), X.shape[1])
        padded[owner, place] = X
        return padded

    def own(P: Tensor, X: Tensor) -> Tensor:
        """[P_i P_iᵀ X_i], (R, ·), of P and X with R rows: Σ M_i V Vᵀ M_iᵀ = B own(A V, Bᵀ)."""
        parts = by_adapter(P)
        return (parts @ (parts.mT @ by_adapter(X)))[owner, place]

    V = _leading(A.T @ own(B.T, A), q)
    U = _leading(B @ own(A @ V, B.T), p)
    V = _leading(A.T @ own(B.T @ U, A), q)
    kept = 0.0
    for _ in range(_ROUNDS):
        U = torch.linalg.qr(B @ own(A @ V, B.T @ U))[0]
        image = A.T @ own(B.T @ U, A @ V)
        now = float((V * image).sum())
        V = torch.linalg.qr(image)[0]
        if now - kept <= _SETTLED * now:
            break
        kept = now
    left, right = B.T @ U, A @ V  # (R, p), (R, q)
    U, V = U @ _leading(left.T @ own(right, left), p), V @ _leading(right.T @ own(left, right), q)
    return U * signs(space.U @ U), V * signs(space.V @ V)


def _leading(gram: Tensor, q: int) -> Tensor:
    """The q leading eigenvectors of a Gram matrix (k, k), (k, q)."""
    vectors: Tensor = torch.linalg.eigh(gram)[1]
    return vectors.flip(1)[:, :q]
