"""DARE, then TIES' election."""

from typing import Annotated, Literal

from torch import Tensor

from lora_cli.algebra.tiles import Ballot, Block, DeltaTiles
from lora_cli.methods import Knob, method


@method("elementwise")
def dare_ties(
    deltas: DeltaTiles,
    weights: Tensor,
    *,
    density: Annotated[float, Knob("share of each update's entries that is kept", above=0, high=1)] = 0.5,
    election: Annotated[Literal["total", "frequency"], Knob("sign by summed value or by count of adapters")] = "total",
    seed: Annotated[int, Knob("which random numbers are drawn", low=0)] = 0,
) -> Tensor:
    """Drop entries of each update at random and enlarge the rest, elect one sign per entry, average those that agree.

    τ̂_i = m_i ∘ ΔW_i / density with masks m_i (out, in) drawn as by `dare`; then γ and the mean over the adapters whose
    sgn(w_i τ̂_i) is γ, as by `ties`. At density 1 it is `ties` at density 1.

    Weights: they matter only relative to each other; a negative one turns its adapter round.

    Cost: O(R · out · in), once: nothing is ranked. One tile per thread and the dense result are held.

    Use: where `ties` is wanted without ranking entries by size. The norm of its result is about that of `ties`: six
    times the plain average's for 8 unrelated adapters, ten times for 30.

    Source: Yu et al. 2023, arXiv 2311.03099, with the election of Yadav et al. 2023, arXiv 2306.01708; on ΔW itself.
    """

    def drop_and_elect(block: Block) -> Tensor:
        ballot = Ballot(block, election)
        for tile, drawn, weight in zip(block, block.uniform(seed), weights.tolist(), strict=True):
            ballot.cast(tile.mul_((drawn < density).to(tile.dtype)).div_(density), weight)
        return ballot.mean()

    return deltas.merge(drop_and_elect)
