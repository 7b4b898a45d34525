"""mlx-lm 0.32.2: `adapters.safetensors` beside an adapter_config.json without peft_type.

`lora_a` is (in, r), `lora_b` (r, out), and ΔW = scale·(lora_a·lora_b)ᵀ with the scale of lora_parameters as it is. The
file names every module that was trained: num_layers, the last so many layers (0 and -1: all), adds nothing to that.
"""

import re

from lora_cli.errors import Refused
from lora_cli.imports import (
    Asked,
    Foreign,
    ForeignModule,
    Found,
    Import,
    Place,
    demand_some,
    number,
    others_in_words,
    text,
)
from lora_cli.imports._pairs import EMBEDDINGS, dtypes_of, paired, turned
from lora_cli.names import leaf

_FILE = re.compile(r"(?:\d+_)?adapters\.safetensors")
_NEWEST = "adapters.safetensors"
_ENDS = (".lora_a", ".lora_b")


class Mlx(Import):
    """An adapter of mlx-lm."""

    program = "an adapter of mlx-lm"

    def recognises(self, place: Place) -> tuple[str, ...]:
        if place.one:
            return place.names if _FILE.fullmatch(place.names[0]) else ()
        return (_NEWEST,) if _NEWEST in place.names else ()

    def open(self, found: Found, asked: Asked) -> Foreign:
        config, file = found.place.config, found.tensors
        kind = text(config, "fine_tune_type") or "lora"
        pairs, others = paired(file.header.tensors, _ENDS)
        if kind == "dora" or any(other.endswith(".m") for other in others):
            raise Refused(
                "DoRA: weights are rescaled by a trained magnitude",
                hint="fuse it into its base (mlx_lm.fuse), then lora extract FUSED --base BASE",
            )
        if kind == "full" or (others and not pairs):
            raise Refused(
                "whole weights were trained, not factors",
                hint="fuse them into the base (mlx_lm.fuse), then lora extract FUSED --base BASE",
            )
        if others:
            raise Refused(f"tensors that are no factors: {others_in_words(others)}")
        parameters = config.get("lora_parameters")
        where = "lora_parameters of adapter_config.json"
        scale = number(parameters if isinstance(parameters, dict) else {}, "scale", where)
        modules: dict[str, ForeignModule] = {}
        for module, (a, b) in pairs.items():
            if len(file.header.tensors[a].shape) == 3:
                raise Refused(f"{module} is a stack of experts, whose factors have no one form in PEFT")
            embedding = leaf(module) in EMBEDDINGS
            modules[module] = turned(file, a, b, scale=scale, kind="embedding" if embedding else "linear")
        demand_some(modules)
        return Foreign(
            kind=self.program,
            modules=modules,
            dtypes=dtypes_of(file, pairs),
            base=text(config, "model") or asked.base,
        )


mlx = Mlx()
