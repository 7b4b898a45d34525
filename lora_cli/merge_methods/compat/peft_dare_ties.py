"""PEFT's combination type "dare_ties"."""

from typing import Annotated, Literal

from torch import Tensor

from lora_cli.algebra.lowrank import LowRank
from lora_cli.algebra.updates import Updates
from lora_cli.merge_methods.compat._apart import dropped, elected, raw, scaled
from lora_cli.methods import Knob, method


@method("factors", weights="sum")
def peft_dare_ties(
    updates: Updates,
    weights: Tensor,
    *,
    density: Annotated[float, Knob("share of the entries of each A and each B that is kept", above=0, high=1)] = 0.2,
    election: Annotated[Literal["total", "frequency"], Knob("sign by summed value or by count of adapters")] = "total",
    seed: Annotated[int, Knob("seed of the entries that are dropped", low=0)] = 0,
) -> LowRank:
    """PEFT's "dare_ties": A and B thinned at random, then signs elected and entries averaged separately.

    Each entry of each A_i (r, in) and B_i (out, r), as stored in the files, stays with probability `density` and is
    divided by it, else it becomes 0. Then each entry elects a sign and averages the factors that have it, as in
    `peft-ties`. ΔW = B A. All ranks in a module must be equal. Adapters that lack the module are left out.

    Weights: as in `peft-ties`: applied after the election, without normalisation.

    Cost: O(n r (out + in)).

    Use: to reproduce a merge made with PEFT, except for its random draw.

    Source: PEFT 0.21.2, `add_weighted_adapter(combination_type="dare_ties")`: equal to rounding given the same mask.
    PEFT draws it from torch's global generator; here it is drawn per adapter and module from the seed. `--election` is
    PEFT's majority_sign_method. After Yu et al. 2023, arXiv 2311.03099, and Yadav et al. 2023, arXiv 2306.01708. PEFT
    always merges a single adapter by "linear"; here entries are dropped.
    """
    factors = dropped(raw(updates, instead="ties"), updates.keys, density, seed)
    return elected(factors, scaled(weights, updates), election)
