"""The axes of the family: the parts that share a coefficient, the function from θ to coefficients, the start of θ."""

from collections.abc import Callable

import torch
from torch import Tensor

from lora_cli.models.mixture import Parameters
from lora_cli.names import layer_of


def along(
    adapters: int,
    granularity: str,
    activation: str,
    init: str,
    *,
    absent: bool = False,
    trained: bool = False,
    fresh: bool = False,
) -> Parameters:
    """The parameters for `adapters` adapters at one point of the axes; see `Parameters` for the others."""
    return Parameters(
        granularity=granularity,
        activation=activation,
        part=_PARTS[granularity],
        per_rank=granularity == "rank",
        start=lambda size, generator: _STARTS[init](size, adapters, generator),
        coefficients=_COEFFICIENTS[activation],
        absent=absent,
        trained=trained,
        fresh=fresh,
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
