"""torchtune 0.6.1 in its own names: what it writes where it has no conversion, or with another checkpointer than HF's.

Its file holds neither alpha nor the number of heads, by which the rows of q_proj and k_proj are ordered: nothing can be
made of it. With FullModelHFCheckpointer torchtune writes the files of PEFT, which need no conversion.
"""

import re

from lora_cli.errors import Refused
from lora_cli.imports import SAFETENSORS, Asked, Foreign, Found, Import, Place

_OWN = re.compile(r"layers\.\d+\.(?:attn|mlp)\.\w+\.lora_[ab]\.weight")


class Torchtune(Import):
    """An adapter in torchtune's own names."""

    program = "an adapter of torchtune in its own names"

    def recognises(self, place: Place) -> tuple[str, ...]:
        return tuple(
            name
            for name in place.names
            if name.endswith(SAFETENSORS) and any(map(_OWN.fullmatch, place.tensor_names(name)))
        )

    def open(self, found: Found, asked: Asked) -> Foreign:
        raise Refused(
            "alpha and the order of its rows are not in the file",
            hint="save it with FullModelHFCheckpointer, which writes PEFT's files",
        )


torchtune = Torchtune()
