"""TIES: trim, elect sign, merge."""

from typing import Annotated, Literal

from torch import Tensor

from lora_cli.algebra.fused import Entries
from lora_cli.algebra.tiles import DeltaTiles
from lora_cli.methods import Knob, method


@method("elementwise")
def ties(
    deltas: DeltaTiles,
    weights: Tensor,
    *,
    density: Annotated[float, Knob("share of each update's entries that is kept", above=0, high=1)] = 0.2,
    election: Annotated[Literal["total", "frequency"], Knob("sign by summed value or by count of adapters")] = "total",
    per: Annotated[Literal["module", "adapter"], Knob("measure per module or over the whole adapter")] = "module",
) -> Tensor:
    """Keep each update's largest entries, elect one sign per entry, average the agreeing.

    Trim: τ̂_i keeps the entries of ΔW_i whose magnitude reaches that of the k-th largest, k = round(density · size),
    among the out·in entries of the module or among all entries of the adapter; equal magnitudes at the border all
    stay. Elect: γ = sgn Σ w_i τ̂_i (total) or sgn Σ sgn(w_i τ̂_i) (frequency); a sum of zero elects no sign. Merge:
    Σ w_i τ̂_i / Σ |w_i| over the adapters whose sgn(w_i τ̂_i) is γ.

    Weights: only their ratios matter; a negative one flips the sign of its adapter.

    Cost: O(R · out · in), twice: for the thresholds and for the election. Memory holds the
    dense result, never an adapter's dense update. `--per adapter` first finds the thresholds over all modules.

    Use: for adapters of different tasks that interfere. The result has full rank: check how much of its energy the
    requested rank keeps. Its norm exceeds the plain average's, five times for 8 unrelated adapters and ten times for
    30, so try `--lambda` below 1 or `--norm-match`.

    Source: Yadav et al. 2023, arXiv 2306.01708, who trim over the whole model (`--per adapter`); PEFT and mergekit
    trim per tensor, which is the default here. PEFT elects + where a sum is zero and divides by the number of
    adapters, not by their weights; its `add_weighted_adapter` works per factor, which is not this method.
    """
    cuts = deltas.thresholds(density, per).tolist()
    return deltas.elect(Entries(weights.tolist(), low=cuts), election)
