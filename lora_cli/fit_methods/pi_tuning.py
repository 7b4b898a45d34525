"""π-Tuning: shares of the adapters by a softmax, and the adapters themselves trained."""

from typing import Annotated, Literal

from lora_cli.fit_methods import Learning
from lora_cli.fit_methods._axes import along
from lora_cli.methods import Knob, method


@method("gradient", lr=1e-4)
def pi_tuning(
    adapters: int,
    *,
    redraw: Annotated[
        Literal["target", "none"], Knob("Draw the factors of the --target adapter anew before the fit, or none.")
    ] = "target",
    checkpoint: Annotated[
        Literal["best", "last"], Knob("The step whose coefficients are kept: the best by validation, or the last.")
    ] = "best",
) -> Learning:
    """Shares by a softmax per module, and the adapters' own factors trained too.

    c = softmax(θ) over the adapters that touch the module, from equal shares (in the paper's comparison absent adapters
    take a share too); θ and all A_i and B_i are trained at one rate, 1e-4. The scale alpha/rank stays fixed beside B_i.
    The result is an ordinary LoRA, Σ c_i s_i B_i A_i with the trained factors. Its coefficients.json fits no other
    adapters, and `lora merge --coef` refuses it.

    redraw: the adapter of `--target` comes first. By default it only lends its rank and modules: A ~ N(0, 0.01²) and
    B = 0 are drawn in place of its factors. `none` starts from them. Without `--target` nothing is drawn.

    The paper chooses the adapters, 20 of them, as `lora select --by quasi-fim -k 20` does.

    Source: π-Tuning, Wu et al. 2023, arXiv 2304.14381, as arXiv 2602.12323 compares it.
    """
    return Learning(
        parameters=along(adapters, "module", "softmax", "zero", trained=True, fresh=redraw == "target"),
        kept=checkpoint,
    )
