"""TSV: task singular vectors."""

import torch
from torch import Tensor

from lora_cli.algebra.lowrank import LowRank
from lora_cli.algebra.spectra import compact, counted, polar, times_polar
from lora_cli.algebra.updates import Updates
from lora_cli.methods import method


@method("spectral", weights="sum")
def tsv(updates: Updates, weights: Tensor) -> LowRank | Tensor:
    """Sum of the updates after their singular vectors are made orthogonal to each other.

    ΔW_i = U_i S_i V_iᵀ, on the singular values above 1e-5 of the update's largest. Side by side,
    U (out, R), S = diag(w_i S_i), V (in, R), the result is

        ΔW = P(U) S P(V)ᵀ,    P(X) = X (XᵀX)^-½,

    the nearest orthonormal columns. P leaves out directions of X below 1e-5 of its strongest: copies of a direction
    share it, where an inverse would amplify noise. If R exceeds a side, orthonormal columns do not exist, and P gives
    orthonormal rows. An update of zero counts as absent.

    Weights: factors on the singular values; a negative one flips its update's sign, 0 leaves its directions to the
    others. Orthogonal adapters give Σ w_i ΔW_i; copies with weight 1 give one adapter, not N of it, so the default is
    the sum. With 1/N the result has 1/√N of an adapter's norm and little effect.

    Cost: O(R² (out + in) + R³), float64; without the dense update unless all factors together are larger than it.

    Use: for up to about ten adapters that overlap in a few directions. Unrelated adapters are nearly orthogonal, and
    the result is nearly their sum. If R is close to the smaller side, strong directions turn towards weak ones,
    whatever their singular values. Nearly equal adapters (beyond 1e-5) are pushed apart: use `--dedupe` first.

    Source: Gargiulo et al. 2024, arXiv 2412.00081 (TSV-M), whose code keeps the leading min(out, in) / N singular
    vectors of the dense update. Beyond an adapter's rank those are arbitrary, but enter the polar factor; its
    polar factor by SVD also fills missing directions. Both agree if it keeps no more than the rank, R fits the smaller
    side and no direction repeats.
    """
    kept, w = counted(updates, weights)
    spectra = [compact(update) for update in kept]
    U = polar(torch.cat([one.U for one in spectra], dim=1))
    V = torch.cat([one.V for one in spectra], dim=1)
    s = torch.cat([one.s * factor for one, factor in zip(spectra, w.tolist(), strict=True)])
    dtype = kept[0].B.dtype
    return times_polar(U * s, V).to(dtype) if kept.outgrown else LowRank(U * s, polar(V).T).to(dtype)
