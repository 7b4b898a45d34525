"""PEFT's combination type "magnitude_prune"."""

from typing import Annotated

from torch import Tensor

from lora_cli.algebra.lowrank import LowRank
from lora_cli.algebra.updates import Updates
from lora_cli.merge_methods.compat._apart import raw, scaled, summed, trimmed
from lora_cli.methods import Knob, method


@method("factors")
def peft_magnitude_prune(
    updates: Updates,
    weights: Tensor,
    *,
    density: Annotated[float, Knob("share of the entries of each A and each B that is kept", above=0, high=1)] = 0.2,
) -> LowRank:
    """PEFT's "magnitude_prune": A and B trimmed and summed separately.

    Each A_i (r, in) and B_i (out, r), as stored in the files, keeps its ⌊density · size⌋ entries of largest magnitude;
    of equal magnitudes at the border, those that torch.topk picks. Then as in `peft-linear`, cross terms included:
    A = Σ sgn(v_i) √|v_i| A_i, B = Σ √|v_i| B_i with v_i = w_i s_i, ΔW = B A. All ranks in a module must be equal.
    Adapters that lack the module are left out.

    Weights: as in `peft-linear`.

    Cost: O(n r (out + in)), the selection included.

    Use: to reproduce a merge made with PEFT. The product of trimmed factors is not the trimmed update.

    Source: PEFT 0.21.2, `add_weighted_adapter(combination_type="magnitude_prune")`, equal to rounding. PEFT always
    merges a single adapter by "linear"; here it is trimmed.
    """
    return summed(trimmed(raw(updates, instead="linear"), density), scaled(weights, updates))
