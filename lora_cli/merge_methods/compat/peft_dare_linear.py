"""PEFT's combination type "dare_linear"."""

from typing import Annotated

from torch import Tensor

from lora_cli.algebra.lowrank import LowRank
from lora_cli.algebra.updates import Updates
from lora_cli.merge_methods.compat._apart import dropped, raw, scaled, summed
from lora_cli.methods import Knob, method


@method("factors")
def peft_dare_linear(
    updates: Updates,
    weights: Tensor,
    *,
    density: Annotated[float, Knob("share of the entries of each A and each B that is kept", above=0, high=1)] = 0.2,
    seed: Annotated[int, Knob("seed of the entries that are dropped", low=0)] = 0,
) -> LowRank:
    """PEFT's "dare_linear": A and B thinned at random and summed separately.

    Each entry of each A_i (r, in) and B_i (out, r), as stored in the files, stays with probability `density` and is
    divided by it, else it becomes 0. Then as in `peft-linear`, cross terms included: A = Σ sgn(v_i) √|v_i| A_i,
    B = Σ √|v_i| B_i with v_i = w_i s_i, ΔW = B A. All ranks in a module must be equal. Adapters that lack the module
    are left out.

    Weights: as in `peft-linear`.

    Cost: O(n r (out + in)).

    Use: to reproduce a merge made with PEFT, except for its random draw. The expected result is `peft-linear`.

    Source: PEFT 0.21.2, `add_weighted_adapter(combination_type="dare_linear")`: equal to rounding given the same mask.
    PEFT draws it from torch's global generator, so it depends on all earlier draws; here it is drawn per adapter and
    module from the seed. After Yu et al. 2023, arXiv 2311.03099. PEFT always merges a single adapter by "linear"; here
    entries are dropped.
    """
    return summed(dropped(raw(updates, instead="linear"), updates.keys, density, seed), scaled(weights, updates))
