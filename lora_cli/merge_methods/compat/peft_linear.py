"""PEFT's combination type "linear"."""

from torch import Tensor

from lora_cli.algebra.lowrank import LowRank
from lora_cli.algebra.updates import Updates
from lora_cli.merge_methods.compat._apart import raw, scaled, summed
from lora_cli.methods import method


@method("factors")
def peft_linear(updates: Updates, weights: Tensor) -> LowRank:
    """PEFT's "linear": A and B summed separately.

    With A_i (r, in) and B_i (out, r) as stored in the files, scale s_i = alpha/rank and v_i = w_i s_i:
    A = Σ sgn(v_i) √|v_i| A_i, B = Σ √|v_i| B_i, ΔW = B A. Beside the intended Σ v_i B_i A_i this has N(N − 1) cross
    terms √|v_i v_j| B_i A_j without a meaning: a rotation of one adapter's ranks, which keeps its update, changes the
    result. All ranks in a module must be equal. Adapters that lack the module are left out.

    Weights: as in PEFT, on the product; PEFT has no default. A negative one flips the sign of A only. N copies of one
    adapter with weights 1/N give a result N times as large.

    Cost: O(n r (out + in)).

    Use: only to reproduce a merge made with PEFT. For random adapters with weights 1 the result has a cosine of 1/√N
    with the intended sum: 0.71 for two, 0.18 for 30. `linear` and `cat` give that sum.

    Source: PEFT 0.21.2, `add_weighted_adapter(combination_type="linear")`, equal to rounding. The result is written
    with alpha = rank; PEFT keeps the first adapter's use_rslora, and then applies its own result √rank times.
    """
    return summed(raw(updates, instead="linear"), scaled(weights, updates))
