"""Weighted sum of updates."""

from torch import Tensor

from lora_cli.algebra.updates import Updates
from lora_cli.methods import method


@method("coefficients")
def linear(updates: Updates, weights: Tensor) -> Tensor:
    """Weighted sum of the updates, reduced to the requested rank.

    ΔW = Σ w_i ΔW_i with ΔW_i = B_i A_i, B_i (out, r_i), A_i (r_i, in): formed as [w_1 B_1, …, w_n B_n] [A_1; …; A_n],
    without error and at rank Σ r_i. A lower rank is the best approximation in the Frobenius norm. An adapter that lacks
    the module counts as zero there.

    Weights: factors, used as given; negative ones subtract. 1/N each is the average, 1 each the sum, λ each task
    arithmetic.

    Cost: O(R² (out + in) + R³) with R = Σ r_i, all for the reduction of the rank; O(R out in) where R (out + in)
    exceeds out · in.

    Use: as the baseline, to be tried first. Unrelated adapters are nearly orthogonal, so the average of N of them is √N
    times smaller than one of them, 5 times at 30; `--norm-match` or `--lambda` compensates. Thirty such adapters of
    rank 16 do not fit into rank 16, which would lose 95 to 97 % of the energy; the share kept is always reported.

    Source: task arithmetic, Ilharco et al. 2023, arXiv 2212.04089. Nothing is combined per factor, so that no
    cross terms B_i A_j arise.
    """
    return weights
