"""DARE on directions instead of entries."""

from typing import Annotated

import torch
from torch import Tensor

from lora_cli.algebra.draws import uniform
from lora_cli.algebra.lowrank import LowRank, numerical_rank, svd
from lora_cli.algebra.updates import Updates
from lora_cli.methods import Knob, method


@method("low-rank")
def rank_dare(
    updates: Updates,
    weights: Tensor,
    *,
    density: Annotated[float, Knob("share of each update's singular directions that is kept", above=0, high=1)] = 0.5,
    seed: Annotated[int, Knob("which random numbers are drawn", low=0)] = 0,
) -> LowRank:
    """Drop singular directions of each update at random, enlarge the rest to make up for it, and sum.

    With the compact SVD ΔW_i = Σ_k σ_ik u_ik v_ikᵀ, U_i (out, r_i) and V_i (in, r_i):
    ΔW = Σ_i w_i/density · Σ_k m_ik σ_ik u_ik v_ikᵀ, where m_ik is 1 with probability `density` and else 0. Draws hang
    on the seed, the adapter, the module and k, which counts from the largest σ. The mean over all seeds is
    `linear`; at density 1 it is `linear`. Which directions belong to equal singular values is not defined, nor then
    what dropping one of them leaves.

    Weights: those of `linear`.

    Cost: O(Σ r_i² (out + in)): an SVD of each adapter; nothing dense. The rank is at most R and about density · R.

    Use: where `dare` is wanted without losing the low rank. Its noise is coarser: few directions are dropped, not
    many entries, and at density 0.5 an adapter of rank 1 is gone in every second module. Raise `density` for adapters
    of low rank.

    Source: the estimator of DARE, Yu et al. 2023, arXiv 2311.03099, on rank-one terms: ours, not the paper's.
    """
    kept = []
    for update, weight, key in zip(updates, weights.tolist(), updates.keys, strict=True):
        spectrum = svd(update)
        rank = numerical_rank(spectrum.s)
        drawn = uniform(seed, key, 0, rank, update.B.device) < density
        left, right = spectrum.U[:, :rank][:, drawn], spectrum.V[:, :rank][:, drawn]
        root = spectrum.s[:rank][drawn].sqrt()
        kept.append(LowRank(left * root * (weight / density), (right * root).T))
    return LowRank(torch.cat([u.B for u in kept], dim=1), torch.cat([u.A for u in kept], dim=0))
