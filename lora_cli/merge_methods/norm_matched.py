"""The weighted mean, scaled to the mean norm of its adapters."""

from typing import Annotated, Literal

from torch import Tensor

from lora_cli.algebra.updates import Updates
from lora_cli.methods import Knob, method


@method("coefficients")
def norm_matched(
    updates: Updates,
    weights: Tensor,
    *,
    per: Annotated[Literal["module", "adapter"], Knob("measure per module or over the whole adapter")] = "module",
) -> Tensor:
    """Weighted mean, scaled to the mean norm of its adapters.

    ΔW = γ Σ w_i ΔW_i with γ = Σ |w_i| ‖ΔW_i‖ / max(‖Σ w_i ΔW_i‖, √(Σ w_i² ‖ΔW_i‖²)), so c_i = γ w_i.

    Adapters of different origin are nearly orthogonal: the mean of N of them keeps 1/√N of their norm (0.18 at
    N = 30), as if every adapter were applied at a fraction of its strength. γ undoes this: copies have γ = 1 and come
    back, and orthogonal updates give a result of norm Σ |w_i| ‖ΔW_i‖, the weighted mean norm. The second term of the
    maximum is the norm of orthogonal updates. Where updates cancel further, the rest is mostly noise, and γ stays that
    of orthogonal updates.
    With --per adapter norms and cosines are those of the whole updates, and all modules get the same c.

    Weights: shares of the mean; a negative one flips the update's sign. Twice the weights give twice the result.

    Cost: that of linear, whose inner products it shares.

    Use: the default, where the mean has the right direction but too small a norm. Copies come back unchanged. It does
    not resolve conflicts: each of N unrelated updates still has a cosine of 1/√N to the result.

    Source: ours; --norm-match of other methods is the same idea without the cap.
    """
    squares = updates.squares(per)
    target = weights.abs() @ squares.sqrt()
    mean = updates.square_of_sum(weights, per).clamp(min=0).sqrt()
    reached = mean.maximum((weights.square() @ squares).sqrt())
    return weights * (target / reached) if reached > 0 else weights
