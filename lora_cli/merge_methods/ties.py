"""TIES: trim, elect sign, merge."""

from typing import Annotated, Literal

import torch
from torch import Tensor

from lora_cli.adapters.tiles import DeltaTiles
from lora_cli.methods import Knob, method


@method("elementwise")
def ties(
    deltas: DeltaTiles,
    weights: Tensor,
    *,
    density: Annotated[float, Knob("share of each update's entries that is kept, per module", above=0, high=1)] = 0.2,
    election: Annotated[Literal["total", "frequency"], Knob("sign by summed value or by count of adapters")] = "total",
) -> Tensor:
    """Keep each update's largest entries, elect one sign per entry, average those that agree.

    Trim: τ̂_i keeps the entries of ΔW_i whose magnitude reaches that of its k-th largest, k = round(density·out·in);
    equal magnitudes at the border all stay. Elect: γ = sgn Σ w_i τ̂_i (total) or sgn Σ sgn(w_i τ̂_i) (frequency); a
    sum of zero elects nothing. Merge: Σ w_i τ̂_i / Σ |w_i| over the adapters whose sgn(w_i τ̂_i) is γ. Weights
    therefore matter only relative to each other.

    Source: Yadav et al. 2023, arXiv 2306.01708, with trimming per module on the update itself, not on A and B apart.
    """
    cuts = deltas.thresholds(density)[:, None, None]
    w = weights.to(cuts)[:, None, None]  # (n, 1, 1)

    def elect_and_average(block: Tensor) -> Tensor:
        kept = torch.where(block.abs() >= cuts, block, 0).mul_(w)  # (n, rows, in)
        votes = kept if election == "total" else kept.sign()
        sign = votes.sum(0).sign()  # (rows, in)
        agree = (kept.sign() == sign) & (kept != 0)
        share = (agree * w.abs()).sum(0)
        return torch.where(agree, kept, 0).sum(0).div_(share.masked_fill_(share == 0, 1))

    return deltas.merge(elect_and_average)
