"""Core space: merge in the small space that all adapters span."""

from torch import Tensor

from lora_cli.algebra.lowrank import LowRank
from lora_cli.algebra.spectra import Inside, Space, compact, counted, merged_inside
from lora_cli.algebra.updates import Updates
from lora_cli.methods import method


@method("space", inside=("ties", "dare", "dare-ties", "della", "breadcrumbs", "sce", "linear", "tsv", "iso-c"))
def core(updates: Updates, weights: Tensor, inside: Inside) -> LowRank:
    """Merge in the R × R space that all updates span, by the method of --inside.

    With balanced factors ΔW_i = B_i A_i, B_i = U_i √S_i and A_i = √S_i V_iᵀ from its SVD, U (out, k) and V (in, l) are
    the left singular vectors of [B_1, …, B_N] and [A_1ᵀ, …, A_Nᵀ], k, l ≤ R, down to 1e-5 of the largest singular
    value. Every update lies in it without loss. The method inside merges the M_i = Uᵀ ΔW_i V, (k, l); ΔW = U · merged ·
    Vᵀ. Each column of U and V has the sign that makes its entry of largest magnitude positive; where singular values
    are equal, the basis is one of many choices, and so is the result of an elementwise method. Adapters of weight 0 do
    not contribute to the basis.

    Weights: as in the method inside. The default of 1/N suits the elementwise methods; give `--weights sum` for tsv and
    iso-c.

    Cost: O(R² (out + in) + R³), float64, and the method inside on R × R entries per adapter in place of out × in.

    Use: for elementwise methods where the result must be of low rank, R at most. For 30 adapters of rank 16 they work
    on a tenth to a hundredth of the entries. These are other entries than outside, so results differ (cosine about 0.6
    for ties); linear, tsv and iso-c give the same result as outside.

    Source: Panariello et al. 2025, arXiv 2509.17786, whose bases come from the factors as trained; ours come
    from balanced factors, so that ΔW alone decides and ranks and alphas may differ.
    """
    kept, w = counted(updates, weights)
    space = Space.of([compact(update) for update in kept])
    return merged_inside(inside, kept, w, space.items, space.U, space.V)
