"""The weights of a base's linear layers, one at a time, for adapters that multiply them."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from lora_cli.algebra.lowrank import squared_norm
from lora_cli.errors import Refused
from lora_cli.formats.checkpoint import BLOCK
from lora_cli.formats.plain import is_plainly_named
from lora_cli.imports._on_base import Weights
from lora_cli.records import Progress, silent, unheard
from lora_cli.steps.bake.plan import Base, Piece, find_base
from lora_cli.steps.convert.pair import demand_whole, in_blocks, layers_of
from lora_cli.text import shortened


@dataclass(frozen=True, kw_only=True)
class BaseWeights(Weights):
    """`Weights` in the files of a base."""

    base: Base
    shapes: Mapping[str, tuple[int, int]]
    places: Mapping[str, tuple[Piece, ...]]

    @property
    def inputs(self) -> Mapping[str, str]:  # type: ignore[override]
        return self.base.inputs

    @property
    def folder(self) -> Path:  # type: ignore[override]
        return self.base.checkpoint.folder

    @cached_property
    def biases(self) -> Collection[str]:  # type: ignore[override]
        tensors = self.base.checkpoint.tensors
        return frozenset(
            module
            for module, pieces in self.places.items()
            if any(f"{piece.tensor.removesuffix('.weight')}.bias" in tensors for piece in pieces)
        )

    def read(self, module: str) -> Tensor:
        shape = self.shapes[module]
        weight, row = torch.empty(shape), 0
        for block in in_blocks(self.base, self.places[module], shape, max(1, BLOCK // shape[1])):
            weight[row : row + len(block)] = block
            row += len(block)
        if not math.isfinite(squared_norm(weight)):
            raise Refused(f"NaN or Inf in {shortened(module)} of {self.base.name}", hint="download the model again")
        return weight


def weights_of_base(
    model: str, modules: Collection[str], *, announce: Callable[[str], None] = unheard, progress: Progress = silent
) -> BaseWeights:
    """The weights of these linear layers of a base, which is downloaded if it is not here.

    Raises:
        NothingMatched, AccessDenied, NetworkError: no such model.
        Refused: a module that is no linear layer of the base, or that it has in integers; see `find_base`.
    """
    base = find_base(model, announce=announce, progress=progress)
    plain = is_plainly_named(base.checkpoint.config, base.checkpoint.tensors)
    shapes, places = layers_of(base, None if plain else base.skeleton)
    if missing := [module for module in modules if module not in places]:
        raise Refused(
            f"{shortened(missing[0])} is no linear layer of {base.name}, which is all that is taken",
            hint="use the adapter with the base model it was trained on",
        )
    shapes = {module: shapes[module] for module in modules}
    demand_whole(base, shapes, places)
    return BaseWeights(base=base, shapes=shapes, places={module: places[module] for module in modules})
