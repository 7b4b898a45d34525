"""Types of PEFT that multiply the base's weights: ΔW = f(W) − W is dense, and a LoRA is its best one of a rank.

The weights of the base are needed, and a rank has to be asked for. Modules are read one at a time.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lora_cli.errors import Refused
from lora_cli.imports import Asked, ForeignModule
from lora_cli.text import shortened

if TYPE_CHECKING:
    from torch import Tensor

    from lora_cli.algebra.lowrank import LowRank

WITH_BASE = "lora convert SRC --base BASE --rank R writes the best LoRA of that rank, and tells the error"
"""The remedy for an update that depends on the base's weights."""


class Weights(ABC):
    """The weights of some linear layers of a base model on this machine.

    `shapes` are theirs, (out, in). `biases` are those of them that have a bias. `inputs` is the base's part of a run's
    inputs, and `folder` its place.
    """

    shapes: Mapping[str, tuple[int, int]]
    biases: Collection[str]
    inputs: Mapping[str, str]
    folder: Path

    @abstractmethod
    def read(self, module: str) -> "Tensor":
        """The weight of a layer, (out, in) in fp32; the caller may change it. Refused for NaN or Inf."""


def demand_weights(asked: Asked, modules: Collection[str], why: str) -> Weights:
    """The base's weights of these modules. Refused with the reason `why` where base or rank was not asked for."""
    if asked.weights is None:
        raise Refused(f"{why}: its update is not in its file", hint=WITH_BASE)
    return asked.weights(modules)


def on_base(weights: Weights, module: str, change: "Callable[[Tensor], Tensor]") -> ForeignModule:
    """The update of a module: `change` makes ΔW of W, both (out, in) in fp32, and may use W's memory."""
    shape = weights.shapes[module]

    def delta() -> "tuple[Tensor, float]":
        from lora_cli.algebra.lowrank import squared_norm

        found = change(weights.read(module))
        total = squared_norm(found)
        if not math.isfinite(total):
            raise Refused(f"the update of {shortened(module)} overflows fp32", hint="leave this adapter out")
        return found, total

    def best(rank: int) -> "tuple[LowRank, float, float]":
        from lora_cli.algebra.lowrank import LowRank
        from lora_cli.algebra.truncation import truncate

        found, total = delta()
        if not total:
            return LowRank(found.new_zeros(shape[0], 0), found.new_zeros(0, shape[1])), 0.0, 0.0
        near = truncate(found, rank)
        return near.at(rank), near.total, near.total - near.remainder(rank)

    def read() -> "LowRank":
        import torch

        from lora_cli.algebra.lowrank import LowRank

        found, _ = delta()
        eye = torch.eye(min(shape))
        return LowRank(eye, found) if shape[0] <= shape[1] else LowRank(found, eye)

    return ForeignModule(shape, min(shape), read, computed=True, best=best)
