"""Coefficients for parts of the model, from the base upwards: the default preset."""

from typing import Annotated, Literal

from lora_cli.fit_methods import Learning
from lora_cli.fit_methods._axes import along
from lora_cli.methods import Knob, method


@method("gradient", lr=5e-2)
def adaptive(
    adapters: int,
    *,
    granularity: Annotated[
        Literal["adapter", "layer", "sublayer", "module", "rank"],
        Knob("The parts of the model with a coefficient of their own."),
    ] = "module",
    activation: Annotated[
        Literal["leaky_relu", "linear", "softmax", "sigmoid", "square"],
        Knob("The function from learnt parameters to coefficients."),
    ] = "leaky_relu",
    init: Annotated[
        Literal["zero", "average", "sqrt", "uniform", "normal"], Knob("Start: 0, 1/N, 1/sqrt N, or random.")
    ] = "zero",
    l1: Annotated[float, Knob("Weight of an L1 penalty on the coefficients.", low=0)] = 0.0,
    checkpoint: Annotated[
        Literal["best", "last"], Knob("The step whose coefficients are kept: the best by validation, or the last.")
    ] = "best",
) -> Learning:
    """The paper's method, from the base upwards, the best step kept.

    granularity: one coefficient per adapter and `adapter` (whole model), `layer`, `sublayer` (attention or MLP of a
    layer), `module`; or one per `rank` of each adapter in each module.

    activation: c = φ(θ): `leaky_relu` (slope 0.01), `linear`, `softmax` over the adapters that touch the part,
    `sigmoid`, `square`.

    init: θ starts at `zero`, `average` (1/N), `sqrt` (1/√N), `uniform` in (0, 1), or `normal` with deviation 0.5.

    l1: λ · mean over the parts of Σ|θ| of the adapters that are there, added once per step.

    Source: arXiv 2602.12323 and the methods it compares.
    """
    return Learning(parameters=along(adapters, granularity, activation, init), l1=l1, kept=checkpoint)
