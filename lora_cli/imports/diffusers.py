"""diffusers, `save_lora_weights` and the attention processors before it: dotted names below the part of the pipeline.

ΔW = s·B·A with the configurations that newer versions write into the file's metadata, one a part, or with alpha/r of
`NAME.alpha` tensors; without either s = 1, as diffusers loads it. Names keep the part in front: unet.…, text_encoder.….
One file may end its names in several ways: since 0.22 its training scripts write the attention of a UNet as
`lora.down`, its other layers as `lora_A`, and a text encoder as `lora_linear_layer.down`.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from lora_cli.errors import ConfigError, Refused
from lora_cli.formats.config import parse_config, parse_json
from lora_cli.formats.factors import PREFIX
from lora_cli.formats.facts import LoraConfigFacts
from lora_cli.imports import (
    SAFETENSORS,
    Asked,
    Foreign,
    ForeignModule,
    Found,
    Import,
    Place,
    Tensors,
    demand_some,
    others_in_words,
)
from lora_cli.imports._pairs import dtypes_of, paired, scales, straight
from lora_cli.text import shortened

_NAME = "pytorch_lora_weights.safetensors"
_OLD_ENDS = ("_lora.down.weight", "_lora.up.weight")
_ALL_ENDS = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    _OLD_ENDS,
)
_PART = re.compile(
    r"(?:unet|text_encoder(?:_\d)?|transformer(?:_\d)?(?=\.(?:single_)?(?:transformer_)?blocks\.)|prior|controlnet)\."
)
_TEXT = "text_encoder"
_METADATA = "lora_adapter_metadata"
_ALPHA = ".alpha"


class Diffusers(Import):
    """LoRA weights of a pipeline of diffusers."""

    program = "an adapter of diffusers"

    def recognises(self, place: Place) -> tuple[str, ...]:
        return tuple(name for name in place.names if name.endswith(SAFETENSORS) and is_of_pipeline(place, name))

    def open(self, found: Found, asked: Asked) -> Foreign:
        file = found.tensors
        pairs, names, others = _paired(file.header.tensors)
        left = [name for name in others if not name.endswith(_ALPHA) or name.removesuffix(_ALPHA) not in pairs]
        if any("magnitude_vector" in name or name.endswith(".dora_scale") for name in left):
            raise Refused("DoRA: weights are rescaled by a trained magnitude")
        if left:
            raise Refused(f"tensors that are no factors: {others_in_words(left)}")
        layers = {name: straight(file, a, b) for name, (a, b) in pairs.items()}
        found_scales, notes = _scales(file, {name: layer.rank for name, layer in layers.items()})
        modules: dict[str, ForeignModule] = {}
        for place, layer in layers.items():
            if names[place] in modules:
                raise _double(names[place])
            modules[names[place]] = replace(layer, scale=found_scales[place])
        demand_some(modules)
        return Foreign(self.program, modules, dtypes_of(file, pairs), base=asked.base, notes=notes)


def is_of_pipeline(place: Place, name: str) -> bool:
    """Whether a file has the name or the tensors of a pipeline's LoRA."""
    names = place.tensor_names(name)
    if any(one.endswith((".lora_down.weight", ".lora_up.weight")) or one.startswith(PREFIX) for one in names):
        return False
    return name == _NAME or any(_PART.match(one) and any(one.endswith(ends) for ends in _ALL_ENDS) for one in names)


def _paired(tensors: Iterable[str]) -> tuple[dict[str, tuple[str, str]], dict[str, str], list[str]]:
    """Place → its two tensors, place → its module, and all other tensors.

    Raises Refused for half a pair, or a place that stands there in two ways.
    """
    pairs: dict[str, tuple[str, str]] = {}
    names: dict[str, str] = {}
    others = [*tensors]
    for ends in _ALL_ENDS:
        found, others = paired(others, ends)
        for place, pair in found.items():
            if place in pairs:
                raise _double(place)
            pairs[place], names[place] = pair, _module(place, old=ends == _OLD_ENDS)
    return pairs, names, others


def _module(place: str, *, old: bool) -> str:
    """The module of a place; an attention processor's projections are those of its attention.

    The oldest form has one set of names for both kinds of attention; that of a text encoder is q_proj to out_proj.
    """
    module = place.replace(".processor.", ".")
    if old and place.startswith(_TEXT):
        return re.sub(r"\.to_(q|k|v|out)$", r".\1_proj", module)
    return re.sub(r"\.to_out$", ".to_out.0", module) if old else module


def _double(name: str) -> Refused:
    return Refused(f"two of its modules are both {shortened(name)}")


def _scales(file: Tensors, ranks: Mapping[str, int]) -> tuple[dict[str, float], tuple[str, ...]]:
    """The scale of each place, and a note where the file does not give it."""
    text = file.header.metadata.get(_METADATA)
    if text is None:
        found, given = scales(file, ranks)
        return found, () if given else ("it gives no alpha: diffusers applies it at scale 1",)
    configs: dict[str, LoraConfigFacts] = {}
    found = {}
    for place, rank in ranks.items():
        part, _, module = place.partition(".")
        if part not in configs:
            configs[part] = _config(text, part)
        found[place] = configs[part].scale(module, rank)
    return found, ()


def _config(text: str, part: str) -> LoraConfigFacts:
    """The configuration of one part, from the metadata, whose keys begin with the part's name."""
    try:
        whole = parse_json(text.encode(), _METADATA)
        entries: dict[str, Any] = {
            key.removeprefix(f"{part}."): value for key, value in whole.items() if key.startswith(f"{part}.")
        }
        facts = parse_config(json.dumps({**entries, "peft_type": "LORA"}).encode())
    except ConfigError as error:
        raise Refused(f"in the file's metadata: {error.message}") from error
    if not entries:
        raise Refused(f"{_METADATA} of the file has no configuration of {shortened(part)}: its scale is not known")
    if reasons := facts.refusals():
        raise Refused(f"{part}: {reasons[0]}")
    return facts


diffusers = Diffusers()
