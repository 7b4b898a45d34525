"""Concatenation of factors."""

from collections.abc import Sequence

from torch import Tensor

from lora_cli.adapters.lowrank import LowRank, concat
from lora_cli.methods import method


@method("factors")
def cat(updates: Sequence[LowRank], weights: Tensor) -> LowRank:
    """Weighted sum of the updates, kept exact: factors side by side, ranks added.

    ΔW = Σ w_i ΔW_i with A = [A_1; …; A_N] and B = [w_1 B_1, …, w_N B_N], rank Σ r_i.

    Source: PEFT's combination type `cat`.
    """
    return concat(updates, weights)
