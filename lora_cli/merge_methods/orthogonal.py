"""Orthogonal projection: a sum in which each update stays out of the space of those before it."""

from typing import Annotated

import torch

from lora_cli.algebra.lowrank import LowRank, concat
from lora_cli.algebra.spectra import compact
from lora_cli.algebra.updates import Updates
from lora_cli.methods import Knob, method


@method("spectral", weights="sum", ordered=True)
def orthogonal(
    updates: Updates,
    weights: torch.Tensor,
    *,
    share: Annotated[float, Knob("share of the singular values so far that is protected", above=0, high=1)] = 0.5,
) -> LowRank:
    """Sum in the order given, each update outside the main directions of those before it.

    The first update is taken whole: M_1 = w_1 ΔW_1. Of each further one only the part outside is added:

        M_t = M_{t-1} + (I - UUᵀ) w_t ΔW_t (I - VVᵀ).

    U (out, r) and V (in, r) are the first r left and right singular vectors of M_{t-1}, where r is the least number
    whose singular values sum to `share` of all of them. What is added is orthogonal to those r directions on both
    sides, so that M_t acts on V, and writes into U, exactly as M_{t-1} did. At `--share 1` every direction is
    protected: the updates in the sum are orthogonal, and once they span a side of the module nothing is added any more.

    The order of the adapters matters: the first one comes in whole, and a copy of an earlier one adds nothing at
    `--share 1`. Two merges in a row, the first n adapters and then the rest, give the same sum if no rank is cut.

    Weights: factors; twice a weight is twice the update, before and after the projection.

    Cost: O(n R² (out + in)) with R = Σ r_i, for an SVD of the sum before each update.

    Use: for tasks that come one after another, where later ones should leave earlier ones alone. The norm grows with
    the number of adapters; `--norm-match` brings it to that of one.

    Source: after OPCM, Tang et al. 2025, arXiv 2501.09522, whose share is 0.5 too. Three steps of its code in
    FusionBench are not taken over: that code clears of ΔW_t only the block in which u_i and v_j are both among the
    first r, and so keeps one-sided components; it removes the components along each pair u_i v_iᵀ beyond r, which
    depend on an arbitrary choice of vectors where M_{t-1} is not of full rank; and it scales the sum to the mean norm
    of the updates. A plain sum of updates whose spaces are orthogonal is what O-LoRA trains, Wang et al. 2023, arXiv
    2310.14152.
    """
    running = updates[0].scaled(float(weights[0]))
    for update, weight in zip(updates[1:], weights.tolist()[1:], strict=True):
        running = concat([running, _outside(update, running, share)], [1.0, weight])
    return running


def _outside(update: LowRank, running: LowRank, share: float) -> LowRank:
    """The part of `update` outside the main singular directions of `running`, on both sides."""
    found = compact(running)
    r = int((found.s.cumsum(0) < share * found.s.sum()).sum()) + 1
    U, V = found.U[:, :r], found.V[:, :r]
    B, A = update.B.double(), update.A.double()
    return LowRank((B - U @ (U.T @ B)).to(update.B.dtype), (A - (A @ V) @ V.T).to(update.A.dtype))
