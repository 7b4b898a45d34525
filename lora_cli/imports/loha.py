"""LoHa of PEFT: ΔW = alpha/r · (w1_a·w1_b) ∘ (w2_a·w2_b), a LoRA of rank r² (arXiv 2108.06098).

The columns of B are the products of a column of w1_a with one of w2_a, entry by entry, and the rows of A those of w1_b
and w2_b.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from lora_cli.errors import Refused
from lora_cli.imports import Asked, Foreign, ForeignModule, Found, Tensors
from lora_cli.imports._pairs import demand_matrices
from lora_cli.imports._peft_types import PeftType, by_module, one_of, settings_of
from lora_cli.text import shortened

if TYPE_CHECKING:
    from lora_cli.algebra.lowrank import LowRank

_FACTORS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_TUCKER = ("hada_t1", "hada_t2")


class Loha(PeftType):
    """LoHa of PEFT."""

    program = "a LoHa of PEFT"
    peft_type = "LOHA"

    def open(self, found: Found, asked: Asked) -> Foreign:
        file, settings = found.tensors, settings_of(found.place.config)
        modules = {}
        for module, tensors in by_module(file.header.tensors, (*_FACTORS, *_TUCKER)).items():
            if any(kind in tensors for kind in _TUCKER):
                raise Refused(f"{shortened(module)} is a convolution with a core of its own (use_effective_conv2d)")
            names = one_of(tensors, _FACTORS, module)
            a1, b1, a2, b2 = (file.header.tensors[name] for name in names)
            demand_matrices(a1, b1, a2, b2)
            rank, shape = a1.shape[1], (a1.shape[0], b1.shape[1])
            if not (a2.shape == a1.shape and b1.shape == b2.shape == (rank, shape[1])):
                raise Refused(f"the factors of {shortened(module)} do not fit together")
            modules[module] = ForeignModule(
                shape, rank**2, _reader(file, names), settings.scale(module, rank), computed=True
            )
        return self.foreign(modules, found.place, asked)


def _reader(file: Tensors, names: "list[str]") -> "Callable[[], LowRank]":
    def read() -> "LowRank":
        import torch

        from lora_cli.algebra.lowrank import LowRank

        a1, b1, a2, b2 = (file.read(name, torch.float64) for name in names)
        rows, columns = a1.shape[0], b1.shape[1]
        b = (a1[:, :, None] * a2[:, None, :]).reshape(rows, -1)  # (out, r²)
        a = (b1[:, None, :] * b2[None, :, :]).reshape(-1, columns)  # (r², in)
        return LowRank(b, a)

    return read


loha = Loha()
