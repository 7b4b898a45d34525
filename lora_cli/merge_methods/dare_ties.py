"""DARE, then TIES' election."""

from typing import Annotated, Literal

from torch import Tensor

from lora_cli.algebra.fused import Drop, Entries
from lora_cli.algebra.tiles import DeltaTiles
from lora_cli.methods import Knob, method


@method("elementwise")
def dare_ties(
    deltas: DeltaTiles,
    weights: Tensor,
    *,
    density: Annotated[float, Knob("share of each update's entries that is kept", above=0, high=1)] = 0.5,
    election: Annotated[Literal["total", "frequency"], Knob("sign by summed value or by count of adapters")] = "total",
    seed: Annotated[int, Knob("seed of the random numbers", low=0)] = 0,
) -> Tensor:
    """Drop entries of each update at random, rescale the rest, elect one sign per entry, average the agreeing.

    τ̂_i = m_i ∘ ΔW_i / density with masks m_i (out, in) drawn as in `dare`; then γ and the mean over the adapters whose
    sgn(w_i τ̂_i) is γ, as in `ties`. At density 1 it equals `ties` at density 1.

    Weights: only their ratios matter; a negative one flips the sign of its adapter.

    Cost: O(R · out · in), once, without ranking. Memory holds the dense result.

    Use: in place of `ties`, without ranking entries by size. The norm of its result is about that of `ties`: six times
    the plain average's for 8 unrelated adapters, ten times for 30.

    Source: Yu et al. 2023, arXiv 2311.03099, with the election of Yadav et al. 2023, arXiv 2306.01708; on ΔW itself.
    """
    return deltas.elect(Entries(weights.tolist(), drop=Drop(density, seed)), election)
