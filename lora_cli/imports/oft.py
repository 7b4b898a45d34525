"""OFT of PEFT: orthogonal blocks R rotate the inputs, ΔW = W·Rᵀ − W (arXiv 2306.07280, 2506.19847).

Each block is the Cayley transform of a skew-symmetric Q, whose upper triangle is in the file, or a few terms of its
Neumann series. The block's size follows from the number of its entries; one block for all is shared by them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lora_cli.errors import Refused
from lora_cli.formats.kinds import CONFIG_NAME
from lora_cli.imports import Asked, Foreign, Found, Tensors, demand_floats, number, text
from lora_cli.imports._on_base import demand_weights, on_base
from lora_cli.imports._peft_types import PeftType, by_module, one_of
from lora_cli.text import shortened

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

_ROTATIONS = ("oft_R.weight",)
_MOST_TERMS = 1000


class Oft(PeftType):
    """OFT of PEFT."""

    program = "an OFT of PEFT"
    peft_type = "OFT"

    def open(self, found: Found, asked: Asked) -> Foreign:
        file = found.tensors
        tensors = by_module(file.header.tensors, _ROTATIONS)
        weights = demand_weights(asked, tensors, "it rotates the base's weights")
        form = _Form.of(found.place.config)
        modules = {}
        for module, names in tensors.items():
            [name] = one_of(names, _ROTATIONS, module)
            entry, (out, into) = file.header.tensors[name], weights.shapes[module]
            demand_floats([entry])
            size = _size_of(entry.shape)
            if into % size or entry.shape[0] not in (1, into // size):
                raise Refused(f"the blocks of {shortened(module)} do not fit a layer of {out}×{into}")
            modules[module] = on_base(weights, module, _change(file, name, size, form))
        foreign = self.foreign(modules, found.place, asked, weights)
        # The version stands in configurations since 0.18, which counts the last term of the series once, not twice.
        older = form.terms is not None and not text(found.place.config, "peft_version")
        note = "saved before PEFT 0.18, which changed the Neumann series: the update is what PEFT makes of it now"
        return replace(foreign, notes=(note,)) if older else foreign


def _size_of(shape: tuple[int, ...]) -> int:
    """The side of a block: n of n·(n − 1)/2 entries. Refused for another number of entries."""
    entries = shape[1] if len(shape) == 2 else 0
    size = (1 + math.isqrt(1 + 8 * entries)) // 2
    if entries < 1 or size * (size - 1) // 2 != entries:
        raise Refused(f"a tensor of shape {'×'.join(map(str, shape))} is no triangle of a block")
    return size


@dataclass(frozen=True, slots=True)
class _Form:
    """How a block follows from Q: the `terms` of the Neumann series, None for the Cayley transform itself.

    `radius` is the largest norm of Q times the root of the number of blocks in the file (COFT), None for any.
    """

    terms: int | None
    radius: float | None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "_Form":
        """By the configuration, with PEFT's defaults for what it leaves out. Refused for a number that is none."""
        given = {"num_cayley_neumann_terms": 5, "eps": 6e-5, "use_cayley_neumann": True, "coft": False, **config}
        terms = number(given, "num_cayley_neumann_terms", CONFIG_NAME) if given["use_cayley_neumann"] else None
        if terms is not None and not (terms.is_integer() and 0 <= terms <= _MOST_TERMS):
            raise Refused(f"num_cayley_neumann_terms is {terms:g}, not from 0 to {_MOST_TERMS}")
        radius = number(given, "eps", CONFIG_NAME) if given["coft"] else None
        return cls(None if terms is None else int(terms), radius)

    def change(self, skew: "Tensor", blocks: int) -> "Tensor":
        """R − I of a block, (n, n) in float64, from its Q. `blocks` is the number of blocks in the file."""
        import torch

        if self.radius is not None:
            most, norm = self.radius / math.sqrt(blocks), float(torch.linalg.norm(skew))
            skew = skew if norm <= most else skew * (most / norm)
        if self.terms is None:
            turned: Tensor = torch.linalg.solve(torch.eye(len(skew), dtype=skew.dtype) + skew, -2 * skew, left=False)
            return turned
        if self.terms < 2:
            return torch.zeros_like(skew)
        if self.terms == 2:
            return 2 * skew
        # 2Q + 2Q² + … and the last power, the third at least, once: by PEFT's loop.
        power = skew @ skew
        found = 2 * skew + 2 * power
        for _ in range(3, self.terms - 1):
            power = power @ skew
            found += 2 * power
        return found + power @ skew


def _change(file: Tensors, name: str, size: int, form: _Form) -> "Callable[[Tensor], Tensor]":
    def change(weight: "Tensor") -> "Tensor":
        import torch

        rows, columns = torch.triu_indices(size, size, 1)
        entries = file.read(name, torch.float64)
        turned = None
        for at in range(weight.shape[1] // size):
            if turned is None or len(entries) > 1:
                skew = torch.zeros(size, size, dtype=torch.float64)
                skew[rows, columns] = entries[at]
                turned = form.change(skew - skew.T, len(entries)).T.float()
            block = slice(at * size, (at + 1) * size)
            weight[:, block] = weight[:, block] @ turned
        return weight

    return change


oft = Oft()
