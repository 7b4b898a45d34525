"""Concatenation of factors."""

from collections.abc import Sequence

from torch import Tensor

from lora_cli.algebra.lowrank import LowRank, concat
from lora_cli.methods import method


@method("factors")
def cat(updates: Sequence[LowRank], weights: Tensor) -> LowRank:
    """Weighted sum of the updates, kept exact: factors side by side, ranks added.

    ΔW = Σ w_i ΔW_i = B A with B = [w_1 B_1, …, w_n B_n] (out, R) and A = [A_1; …; A_n] (R, in), R = Σ r_i. The factors
    are those of the adapters, to the bit but for the weights and scales, which go into B. An adapter that lacks the
    module counts as zero there.

    Weights: factors, taken as they are; negative ones subtract. 1/N each is the average, 1 each the sum.

    Cost: O(R (out + in)): the factors are copied, nothing else.

    Use: where the sum must be exact, or another tool is to reduce its rank. The file is as large as all adapters
    together, and servers limit the rank, often to 64 or 512; `linear` is the same sum at the rank asked for.

    Source: PEFT's combination type `cat`, which is exact too. There weights and scales go into A, here into B.
    """
    return concat(updates, weights)
