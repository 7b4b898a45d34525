"""Coefficients for parts of the model, learnt by gradient descent."""

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from torch import Tensor

from lora_cli.methods import Knob, method
from lora_cli.models.mixture import Parameters
from lora_cli.names import layer_of


@method("gradient")
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
) -> Parameters:
    """One coefficient per adapter and part of the model.

    granularity: one per adapter and `adapter` (whole model), `layer`, `sublayer` (attention or MLP of a layer),
    `module`; or one per `rank` of each adapter in each module.

    activation: c = φ(θ): `leaky_relu` (slope 0.01), `linear`, `softmax` over the adapters that touch the part,
    `sigmoid`, `square`.

    init: θ starts at `zero`, `average` (1/N), `sqrt` (1/√N), `uniform` in (0, 1), or `normal` with deviation 0.5.

    Source: arXiv 2602.12323 and the methods it compares.
    """
    return Parameters(
        part=_PARTS[granularity],
        per_rank=granularity == "rank",
        start=lambda size, generator: _STARTS[init](size, adapters, generator),
        coefficients=_COEFFICIENTS[activation],
    )


def _layer(module: str) -> str:
    layer = layer_of(module)
    return module if layer is None or not layer.place else layer.name


def _sublayer(module: str) -> str:
    layer = layer_of(module)
    return module if layer is None or not layer.place else f"{layer.name}.{layer.place.partition('.')[0]}"


def _softmax(theta: Tensor, present: Tensor) -> Tensor:
    # An adapter that is absent from a part must have no share of the softmax.
    return theta.masked_fill(~present, -torch.inf).softmax(dim=-1)


_PARTS: dict[str, Callable[[str], str]] = {
    "adapter": lambda module: "",
    "layer": _layer,
    "sublayer": _sublayer,
    "module": lambda module: module,
    "rank": lambda module: module,
}
_STARTS: dict[str, Callable[[int, int, torch.Generator], Tensor]] = {
    "zero": lambda size, n, generator: torch.zeros(size),
    "average": lambda size, n, generator: torch.full((size,), 1 / n),
    "sqrt": lambda size, n, generator: torch.full((size,), n**-0.5),
    "uniform": lambda size, n, generator: torch.rand(size, generator=generator),
    "normal": lambda size, n, generator: 0.5 * torch.randn(size, generator=generator),
}
_COEFFICIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": lambda theta, present: theta,
    "leaky_relu": lambda theta, present: torch.nn.functional.leaky_relu(theta, 0.01),
    "softmax": _softmax,
    "sigmoid": lambda theta, present: theta.sigmoid(),
    "square": lambda theta, present: theta.square(),
}
