"""Weighted sum of updates."""

from collections.abc import Sequence

from torch import Tensor

from lora_cli.adapters.lowrank import LowRank, concat
from lora_cli.methods import method


@method("low-rank")
def linear(updates: Sequence[LowRank], weights: Tensor) -> LowRank:
    """Weighted sum of the updates, reduced to the rank asked for.

    ΔW = Σ w_i ΔW_i. Weights 1/N give the average, weights 1 the sum. At rank Σ r_i the result is exact; a lower rank
    is its best approximation in the Frobenius norm.

    Source: task arithmetic, Ilharco et al. 2023, arXiv 2212.04089.
    """
    return concat(updates, weights)
