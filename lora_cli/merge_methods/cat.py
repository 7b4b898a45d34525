"""Concatenation of factors."""

from collections.abc import Sequence

from torch import Tensor

from lora_cli.algebra.lowrank import LowRank, concat
from lora_cli.methods import method


@method("factors")
def cat(updates: Sequence[LowRank], weights: Tensor) -> LowRank:
    """Weighted sum of the updates, kept exact: factors side by side, ranks added.

    ΔW = Σ w_i ΔW_i = B A with B = [w_1 B_1, …, w_n B_n] (out, R) and A = [A_1; …; A_n] (R, in), R = Σ r_i. The factors
    equal those of the adapters bit by bit, except that weights and scales are multiplied into B. An adapter that lacks
    the module counts as zero there.

    Weights: factors, used as given; negative ones subtract. 1/N each is the average, 1 each the sum.

    Cost: O(R (out + in)): the factors are only copied.

    Use: where the sum must be exact, or another tool reduces its rank. The file is as large as all adapters together.
    Servers limit the rank, often to 64 or 512; `linear` is the same sum at the requested rank.

    Source: PEFT's combination type `cat`, which is exact too. PEFT multiplies weights and scales into A, this method
    into B.
    """
    return concat(updates, weights)
