"""PEFT's combination type "ties"."""

from typing import Annotated, Literal

from torch import Tensor

from lora_cli.algebra.lowrank import LowRank
from lora_cli.algebra.updates import Updates
from lora_cli.merge_methods.compat._apart import elected, raw, scaled, trimmed
from lora_cli.methods import Knob, method


@method("factors", weights="sum")
def peft_ties(
    updates: Updates,
    weights: Tensor,
    *,
    density: Annotated[float, Knob("share of the entries of each A and each B that is kept", above=0, high=1)] = 0.2,
    election: Annotated[Literal["total", "frequency"], Knob("sign by summed value or by count of adapters")] = "total",
) -> LowRank:
    """PEFT's "ties": A and B trimmed, then signs elected and entries averaged separately.

    With X_i one of A_i (r, in) and B_i (out, r) as stored in the files: the ⌊density · size⌋ entries of largest
    magnitude stay (of equal ones at the border, those that torch.topk picks). Elect per entry, without weights: plus
    where Σ X_i ≥ 0 (total) or Σ sgn(X_i) ≥ 0 (frequency), else minus. Merge: the mean of u_i X_i over the adapters
    whose X_i has that sign, u_i = √|v_i| for B and sgn(v_i) √|v_i| for A, v_i = w_i s_i. ΔW = B A. All ranks in a
    module must be equal. Adapters that lack the module are left out.

    Weights: applied after the election; the divisor is the number of agreeing adapters, not their weights: with weights
    1/N the result is N times smaller than with 1. A negative weight does not flip an adapter's vote, and an adapter of
    weight 0 still votes and counts.

    Cost: O(n r (out + in)), the selection included.

    Use: to reproduce a merge made with PEFT. It is not TIES of the updates: for random adapters (rank 16, 512 × 512)
    the result has a cosine of 0.26 with `ties` for three, 0.05 for 30; without trimming, 0.31 and 0.10.

    Source: PEFT 0.21.2, `add_weighted_adapter(combination_type="ties")`, equal to rounding; `--election` is its
    majority_sign_method. After Yadav et al. 2023, arXiv 2306.01708. PEFT always merges a single adapter by
    "linear"; here it is trimmed.
    """
    return elected(trimmed(raw(updates, instead="ties"), density), scaled(weights, updates), election)
