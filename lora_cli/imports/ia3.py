"""(IA)³ of PEFT: a vector l multiplies the inputs of feed-forward layers, ΔW = W·diag(l) − W, or the outputs of others,
ΔW = diag(l)·W − W (arXiv 2205.05638).

PEFT keeps l as a row for inputs and as a column for outputs, and loads no adapter whose configuration says otherwise.
What multiplies outputs multiplies the bias too, which no LoRA does.
"""

from typing import TYPE_CHECKING

from lora_cli.errors import Refused
from lora_cli.imports import Asked, Foreign, Found, Tensors, demand_floats
from lora_cli.imports._on_base import demand_weights, on_base
from lora_cli.imports._peft_types import PeftType, by_module, one_of
from lora_cli.text import shortened

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

_VECTORS = ("ia3_l",)


class Ia3(PeftType):
    """(IA)³ of PEFT."""

    program = "an (IA)³ of PEFT"
    peft_type = "IA3"

    def open(self, found: Found, asked: Asked) -> Foreign:
        file = found.tensors
        tensors = by_module(file.header.tensors, _VECTORS)
        weights = demand_weights(asked, tensors, "its vectors multiply the base's weights")
        modules = {}
        for module, names in tensors.items():
            [name] = one_of(names, _VECTORS, module)
            entry, (out, into) = file.header.tensors[name], weights.shapes[module]
            demand_floats([entry])
            if entry.shape not in ((1, into), (out, 1)):
                raise Refused(f"the vector of {shortened(module)} does not fit a layer of {out}×{into}")
            if entry.shape != (1, into) and module in weights.biases:
                raise Refused(
                    f"{shortened(module)} has a bias in the base, which its vector multiplies too: no LoRA does that",
                    hint="merge it into its base by PEFT (merge_and_unload), and use the merged model",
                )
            modules[module] = on_base(weights, module, _change(file, name))
        return self.foreign(modules, found.place, asked, weights)


def _change(file: Tensors, name: str) -> "Callable[[Tensor], Tensor]":
    def change(weight: "Tensor") -> "Tensor":
        import torch

        # A row or a column, less 1 in float64: near 1 its digits would be lost.
        return weight.mul_((file.read(name, torch.float64) - 1).float())

    return change


ia3 = Ia3()
