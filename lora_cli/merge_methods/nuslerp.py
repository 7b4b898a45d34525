"""NuSLERP: SLERP with an angle for each row or each column."""

from typing import Annotated, Literal

import torch
from torch import Tensor

from lora_cli.algebra.lowrank import LowRank, concat
from lora_cli.algebra.updates import Updates
from lora_cli.merge_methods.slerp import on_arc, slerp
from lora_cli.methods import Knob, method


@method("low-rank")
def nuslerp(
    updates: Updates,
    weights: Tensor,
    *,
    angles: Annotated[Literal["whole", "row", "column"], Knob("one angle for all, or one per row or column")] = "whole",
) -> LowRank:
    """Spherical interpolation between two adapters, by rows or columns if asked.

    whole: slerp. row: with x_i a row of ΔW_i, that row of the result is s Σ sin(p_i θ) / sin θ · sgn(w_i) x_i, with s
    and p_i as in slerp and θ the row's own: diag(c_i) B_i keeps the rank. column: the same for each column, A_i
    diag(c_i). Rows that are parallel, within 2 degrees of opposite, or zero in one of the adapters are interpolated
    linearly. With whole, opposite updates are refused.

    Weights: the place on the arc, as in slerp: A=0.7 B=0.3 is at 0.3 of the way from A to B.

    Cost: whole: as slerp. row, column: O(R² (out + in)).

    Use: row or column where the adapters differ more in some outputs or inputs than in others. One angle for the whole
    adapter is slerp's --per adapter.

    Source: mergekit's nuslerp on updates: whole is its nuslerp_flatten. For weights (out, in) its
    nuslerp_row_wise is column here; without either flag it is row. It normalises its weights; here 1 and 1 give twice
    the result of 0.5 and 0.5, as everywhere. It extrapolates for a negative weight, takes the middle where weights
    cancel, and 90 degrees where a row is zero.
    """
    if angles == "whole" or len(updates) != 2:
        return concat(updates, slerp(updates, weights))
    if angles == "column":
        turned = _by_row([LowRank(u.A.T, u.B.T) for u in updates], weights)
        return LowRank(turned.A.T, turned.B.T)
    return _by_row(updates.items, weights)


def _by_row(pair: list[LowRank] | tuple[LowRank, ...], weights: Tensor) -> LowRank:
    x, y = (LowRank(u.B.double(), u.A.double()) for u in pair)
    dots = [((p.B @ (p.A @ q.A.T)) * q.B).sum(1) for p, q in ((x, x), (y, y), (x, y))]  # each (out,)
    c = on_arc(weights.to(dots[0]), torch.stack(dots[:2]), dots[2])  # (2, out)
    rows = [u.B * c[i, :, None].to(u.B) for i, u in enumerate(pair)]
    return LowRank(torch.cat(rows, dim=1), torch.cat([u.A for u in pair]))
