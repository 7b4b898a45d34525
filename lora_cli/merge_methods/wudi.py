"""WUDI: one update that acts like each adapter on that adapter's own input directions."""

from itertools import accumulate
from typing import Annotated

import torch
from torch import Tensor

from lora_cli.algebra.grams import products
from lora_cli.algebra.lowrank import LowRank, concat
from lora_cli.algebra.updates import Updates
from lora_cli.methods import Knob, method


@method("low-rank", weights="sum")
def wudi(
    updates: Updates,
    weights: Tensor,
    *,
    ridge: Annotated[float, Knob("pull towards the mean, beside an adapter's whole energy 1", above=0, high=1)] = 1e-4,
) -> LowRank | Tensor:
    """Least interference on each adapter's own input directions, in closed form and without data.

    X minimises Σ |w_i| ‖(X − w_i ΔW_i) ΔW_iᵀ‖² / ‖ΔW_i‖² + ρ ‖X − X_0‖². The rows of ΔW_i stand in for the
    activations of adapter i, so this is RegMean with the Grams H_i = ΔW_iᵀΔW_i / ‖ΔW_i‖² (in, in), of trace 1, in place
    of measured ones:

        X = (Σ |w_i| w_i ΔW_i H_i + ρ X_0) (Σ |w_i| H_i + ρ I)⁻¹.

    The system is solved among the R = Σ r_i ranks, which may exceed `in`. With B̂ = [B_i], Â = [A_i] and, R × R,
    P = diag(|w_i| B_iᵀB_i / ‖ΔW_i‖²), D = diag(A_iA_iᵀ), S = diag(|w_i| / Σ |w|),

        X = B̂ diag(w) (DP + ρS) (ÂÂᵀP + ρI)⁻¹ Â.

    X_0 is the mean of the w_i ΔW_i by |w_i|, and ρ = ridge · Σ w² / Σ |w|: without it, nearly equal A
    make the result explode. If the rows of Â are independent and ridge → 0, the first sum reaches 0: X acts on the
    directions of each adapter as w_i ΔW_i does. An update of zero counts as absent; if all are zero, so is the result.

    Weights: factors on each update on its own directions and, by magnitude, its share where directions of several
    overlap. Orthogonal adapters give Σ w_i ΔW_i, copies their mean, so the default is 1 each. A weight of 0 leaves the
    adapter's directions to the others.

    Cost: O(R² (out + in) + R³), float64.

    Use: in place of a sum of adapters whose inputs overlap; regmean if a few inputs are available. Directions with
    little of an adapter's energy drift towards the mean: at rank 16 and a flat spectrum by 0.2 %, at rank 256 by 3 %.

    Source: Cheng et al. 2025, arXiv 2503.08099, whose code takes 300 steps of Adam from the sum of the updates, on
    attention and MLP modules; this is the minimum that those steps approach. The pull towards the mean
    replaces their early stop; weights are ours.
    """
    squares = updates.squares()
    w = torch.where(squares > 0, weights, 0)
    total = w.abs().sum()
    if total == 0:
        return concat(updates, [0.0] * len(updates))
    rho = float(ridge * w.square().sum() / total)
    energy = w.abs() / torch.where(squares > 0, squares, 1)
    a = torch.cat([update.A for update in updates]).double()  # (R, in)
    system = products([a], a.dtype)  # ÂÂᵀ, from here on (R, R)
    left = []
    ends = accumulate(updates.ranks)
    for update, end, factor, size in zip(updates, ends, w.tolist(), energy.tolist(), strict=True):
        block, b = slice(end - update.rank, end), update.B.double()
        p = b.T @ b * size
        own = system[block, block] @ p  # DP
        own.diagonal().add_(rho * abs(factor) / float(total))
        left.append(b @ own * factor)
        system[:, block] = system[:, block] @ p
    system.diagonal().add_(rho)
    solved = torch.linalg.solve(system, torch.cat(left, dim=1), left=False)  # (out, R)
    if updates.outgrown:
        dense: Tensor = solved @ a
        return dense.to(updates[0].B.dtype)
    # If rows of Â are nearly equal, the mixture is large and cancels: orthonormal rows avoid this.
    q, r = torch.linalg.qr(a.T)  # (in, k), (k, R)
    return LowRank(solved @ r.T, q.T).to(updates[0].B.dtype)
