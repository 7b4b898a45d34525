"""KnOTS: merge in the joint output space of the adapters."""

import torch
from torch import Tensor

from lora_cli.algebra.lowrank import LowRank
from lora_cli.algebra.spectra import Inside, basis, compact, counted, merged_inside
from lora_cli.algebra.updates import Updates
from lora_cli.methods import method


@method("space", inside=("ties", "linear", "dare-ties"))
def knots(updates: Updates, weights: Tensor, inside: Inside) -> LowRank:
    """Merge in the output directions that all updates share, by the method of --inside.

    [ΔW_1, …, ΔW_N] = U Σ [V_1ᵀ, …, V_Nᵀ], (out, N·in), on the k ≤ R singular values above 1e-5 of the largest. The
    method inside merges the Σ V_iᵀ = Uᵀ ΔW_i, (k, in); ΔW = U · merged. U has the sign that makes the entry of largest
    magnitude in each column positive; where singular values are equal, U is one of many choices, and so is the
    result of an elementwise method. Adapters of weight 0 do not contribute to U.

    Weights: as in the method inside.

    Cost: O(R² (out + in) + R³), float64, and the method inside on R × in entries per adapter in place of out × in.

    Use: for ties and dare-ties where the result must be of low rank, k at most: nothing is lost to a reduction if
    --rank allows k. A linear method gives the same result inside as outside. The --density of ties counts entries of
    this space.

    Source: Stoica et al. 2024, arXiv 2410.19735, by Gram matrices of the factors in place of a dense SVD. The
    paper chooses the largest entries over the whole adapter; this method does so by module, because every module has
    its own space.
    """
    kept, w = counted(updates, weights)
    spectra = [compact(update) for update in kept]
    U, parts = basis(torch.cat([one.U * one.s for one in spectra], dim=1))
    ranks = [one.s.numel() for one in spectra]
    items = [LowRank(part, one.V.T) for part, one in zip(torch.split(parts, ranks, dim=1), spectra, strict=True)]
    return merged_inside(inside, kept, w, items, U)
