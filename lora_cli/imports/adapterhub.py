"""AdapterHub's `adapters` 1.3.0 with use_safetensors: adapter.safetensors beside an adapter_config.json of its own.

`MODULE.loras.NAME.lora_A` is (r, in), `lora_B` (out, r), and ΔW = alpha/r·B·A by the configuration below `config`. By
default the library pickles its weights; these are never opened here.
"""

import re
from dataclasses import replace
from typing import Any

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
    unpickled,
)
from lora_cli.imports._pairs import dtypes_of, paired, straight
from lora_cli.text import in_words, shortened

_SAFE, _PICKLE = "adapter.safetensors", "pytorch_adapter.bin"
_ENDS = (".lora_A", ".lora_B")
_PLACE = re.compile(r"(.+)\.loras\.([^.]+)")
_WHERE = "config of adapter_config.json"


class Adapterhub(Import):
    """An adapter of AdapterHub's library."""

    program = "an adapter of AdapterHub"

    def recognises(self, place: Place) -> tuple[str, ...]:
        for name in (_SAFE, _PICKLE):
            if name in place.names and (name == _PICKLE or _is_theirs(place)):
                return (name,)
        return ()

    def open(self, found: Found, asked: Asked) -> Foreign:
        if found.weights == (_PICKLE,):
            raise Refused(f"{_PICKLE} is a pickle, which can run code: never opened", hint=unpickled(_PICKLE, _SAFE))
        config = found.place.config
        inner = config.get("config")
        settings: dict[str, Any] = inner if isinstance(inner, dict) else {}
        _demand_lora(settings)
        file = found.tensors
        pairs, others = paired(file.header.tensors, _ENDS)
        if others:
            raise Refused(f"tensors that are no factors: {others_in_words(others)}")
        modules: dict[str, ForeignModule] = {}
        adapters = set()
        for place, (a, b) in pairs.items():
            named = _PLACE.fullmatch(place)
            if named is None:
                raise Refused(f"{shortened(place)} is not below loras")
            adapters.add(named[2])
            layer = straight(file, a, b)
            modules[named[1]] = replace(layer, scale=number(settings, "alpha", _WHERE) / layer.rank)
        if len(adapters) > 1:
            raise Refused(f"{len(adapters)} adapters in one file ({shortened(in_words(sorted(adapters)))})")
        demand_some(modules)
        ranks = {one.rank for one in modules.values()}
        if ranks != {settings.get("r")}:
            raise Refused(f"its factors have rank {in_words(sorted(map(str, ranks)))}, but r is {settings.get('r')}")
        base = text(config, "model_name") or asked.base
        return Foreign(self.program, modules, dtypes_of(file, pairs), base=base)


def _is_theirs(place: Place) -> bool:
    try:
        return "config" in place.config and "peft_type" not in place.config
    except Refused:
        return False


def _demand_lora(settings: dict[str, Any]) -> None:
    """Refused for a configuration of another method than an additive LoRA."""
    architecture = settings.get("architecture")
    if architecture != "lora":
        raise Refused(f"its architecture is {shortened(architecture or 'bottleneck')}, not lora: no update of weights")
    if settings.get("composition_mode", "add") != "add":
        raise Refused("its vectors multiply the weights (composition_mode scale)")
    for key, reason in (
        ("use_dora", "DoRA: weights are rescaled by a trained magnitude"),
        ("use_gating", "the update depends on the input (use_gating)"),
        ("vera_d", "VeRA: its shared projections are not in the file"),
    ):
        if settings.get(key):
            raise Refused(reason)


adapterhub = Adapterhub()
