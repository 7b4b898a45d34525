"""DARE: drop and rescale."""

from typing import Annotated

from torch import Tensor

from lora_cli.algebra.fused import Drop, Entries
from lora_cli.algebra.tiles import DeltaTiles
from lora_cli.methods import Knob, method


@method("elementwise")
def dare(
    deltas: DeltaTiles,
    weights: Tensor,
    *,
    density: Annotated[float, Knob("share of each update's entries that is kept", above=0, high=1)] = 0.5,
    seed: Annotated[int, Knob("seed of the random numbers", low=0)] = 0,
) -> Tensor:
    """Drop entries of each update at random, rescale the rest by 1/density, and sum.

    ΔW = Σ w_i m_i ∘ ΔW_i / density, where each entry of the mask m_i (out, in) is 1 with probability `density`, else
    0. The draw depends on the seed, the adapter (its commit, and its folder if a repository holds several), the module
    and the entry's place, but not on the order of the adapters or the size of blocks. The mean over all seeds is
    `linear`; density 1 is `linear`.

    Weights: those of `linear`.

    Cost: O(R · out · in). Memory holds the dense result.

    Use: as a reference point. Dropping adds noise of variance (1 - density)/density · w_i² · ΔW_i² to each entry and
    removes nothing on average; the paper shows that much can be dropped without harm. `rank-dare` drops whole
    directions and keeps the rank low; `dare-ties` elects signs after dropping.

    Source: Yu et al. 2023, arXiv 2311.03099, on ΔW itself. PEFT's `dare_linear` drops per factor.
    """
    return deltas.sum(Entries(weights.tolist(), drop=Drop(density, seed)))
