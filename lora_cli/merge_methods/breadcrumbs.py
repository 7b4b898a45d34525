"""Model Breadcrumbs: neither the largest entries nor the small ones."""

from typing import Annotated, Literal

from torch import Tensor

from lora_cli.algebra.fused import Entries
from lora_cli.algebra.tiles import DeltaTiles
from lora_cli.methods import Knob, method


@method("elementwise")
def breadcrumbs(
    deltas: DeltaTiles,
    weights: Tensor,
    *,
    density: Annotated[float, Knob("share of each update's entries that is kept", above=0, high=1)] = 0.2,
    gamma: Annotated[float, Knob("share of the largest entries that is dropped", low=0, below=1)] = 0.01,
    per: Annotated[Literal["module", "adapter"], Knob("measure per module or over the whole adapter")] = "module",
) -> Tensor:
    """Drop the few largest entries of each update and all small ones, and sum.

    ΔW = Σ w_i τ̂_i, where τ̂_i keeps the entries of ΔW_i (out, in) whose magnitude reaches that of the
    round((γ + density) · size)-th largest, but not that of the round(γ · size)-th. At least one entry is dropped, none
    at γ = 0. Equal magnitudes at the lower border all stay; at the upper border all go. If γ + density exceeds 1, the
    density is kept and fewer of the largest are dropped: density 1 is `linear`.

    Weights: those of `linear`.

    Cost: O(R · out · in), three times: for each border and for the sum. Memory holds the dense
    result.

    Use: where single outliers carry a task's quirks. The largest entries of a low-rank update lie in few rows and
    columns; dropping them changes more than dropping the same share of a full fine-tune.

    Source: Davari and Belilovsky 2023, arXiv 2312.06795, who mask layer by layer and add the masked task vectors;
    in mergekit, `breadcrumbs_ties` elects signs afterwards.
    """
    gamma = min(gamma, 1 - density)
    lower = deltas.thresholds(density + gamma, per).tolist()
    upper = deltas.thresholds(gamma, per).tolist() if gamma > 0 else []
    return deltas.sum(Entries(weights.tolist(), low=lower, high=upper))
