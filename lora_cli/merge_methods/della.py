"""DELLA: drop by magnitude within a row, elect, merge."""

from typing import Annotated, Literal

import torch
from torch import Tensor

from lora_cli.algebra.kernels import mean_ranks
from lora_cli.algebra.tiles import Ballot, Block, DeltaTiles
from lora_cli.errors import UsageError
from lora_cli.methods import Knob, method


@method("elementwise")
def della(
    deltas: DeltaTiles,
    weights: Tensor,
    *,
    density: Annotated[float, Knob("share of each update's entries that is kept", above=0, high=1)] = 0.5,
    epsilon: Annotated[float, Knob("how far the chance to stay may differ from the density", low=0, below=0.5)] = 0.1,
    election: Annotated[Literal["total", "frequency"], Knob("sign by summed value or by count of adapters")] = "total",
    seed: Annotated[int, Knob("seed of the random numbers", low=0)] = 0,
) -> Tensor:
    """Drop entries at random, small ones of a row more often, rescale, elect one sign per entry, average the agreeing.

    τ̂_i keeps an entry with probability p = density - ε + 2ερ and divides it by p, where ρ is its place among the
    magnitudes of its row (0 smallest, 1 largest; equal ones share the mean of their places). Then γ and the mean over
    the adapters whose sgn(w_i τ̂_i) is γ, as in `ties`. The draws equal those of `dare`. At ε = 0 it is `dare-ties`.

    Weights: only their ratios matter; a negative one flips the sign of its adapter.

    Cost: O(R · out · in + n · out · in · log in): every row of every adapter is sorted, which takes about ten times as
    long as `dare-ties`. Memory holds one tile per thread and the dense result.

    Use: between `dare-ties` (chance alone) and `ties` (size alone). density ± ε must lie within (0, 1].

    Source: Deep et al. 2024, arXiv 2406.11617 (MagPrune), which rescales every entry by its own 1/p; mergekit
    rescales whole tensors to their former L1 norm.
    """
    if not (density - epsilon > 0 and density + epsilon <= 1):
        raise UsageError(
            f"della: with --density {density:g} and --epsilon {epsilon:g} the chance to stay leaves (0, 1]",
            hint="choose a smaller --epsilon",
        )

    def drop_and_elect(block: Block) -> Tensor:
        ballot = Ballot(block, election)
        for tile, drawn, weight in zip(block, block.uniform(seed), weights.tolist(), strict=True):
            chance = mean_ranks(tile).mul_(2 * epsilon).add_(density - epsilon)
            ballot.cast(torch.where(drawn < chance, tile.div_(chance), 0), weight)
        return ballot.mean()

    return deltas.merge(drop_and_elect)
