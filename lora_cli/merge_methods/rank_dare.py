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
    seed: Annotated[int, Knob("seed of the random numbers", low=0)] = 0,
) -> LowRank:
    """Drop singular directions of each update at random, rescale the rest by 1/density, and sum.

    With the compact SVD ΔW_i = Σ_k σ_ik u_ik v_ikᵀ, U_i (out, r_i) and V_i (in, r_i):
    ΔW = Σ_i w_i/density · Σ_k m_ik σ_ik u_ik v_ikᵀ, where m_ik is 1 with probability `density`, else 0. The draw
    depends on the seed, the adapter, the module and k, which counts from the largest σ. The mean over all seeds is
    `linear`; density 1 is `linear`. Equal singular values have no unique directions, so that the result of dropping one
    of them is arbitrary.

    Weights: those of `linear`.

    Cost: O(Σ r_i² (out + in)): an SVD of each adapter, without dense matrices. The rank is at most R, on
    average density · R.

    Use: as `dare`, at low rank. Its noise is coarser, because it drops a few directions instead of many entries: at
    density 0.5 an adapter of rank 1 vanishes in every second module. Raise `density` for adapters of low rank.

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
