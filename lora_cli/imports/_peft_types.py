"""Types of PEFT other than LoRA: a configuration that names the type, and tensors below one prefix."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lora_cli.errors import Refused
from lora_cli.formats.config import parse_config
from lora_cli.formats.factors import PREFIX
from lora_cli.formats.facts import LoraConfigFacts
from lora_cli.formats.kinds import WEIGHTS_NAME
from lora_cli.imports import Asked, Foreign, ForeignModule, Import, Place, demand_some, others_in_words, text
from lora_cli.text import shortened

if TYPE_CHECKING:
    from lora_cli.imports._on_base import Weights

_CARRIED = ("task_type", "fan_in_fan_out", "revision")


class PeftType(Import):
    """A type of PEFT, `peft_type` in its configuration."""

    peft_type: str

    def recognises(self, place: Place) -> tuple[str, ...]:
        return (WEIGHTS_NAME,) if WEIGHTS_NAME in place.names and place.peft_type == self.peft_type else ()

    def foreign(
        self, modules: Mapping[str, ForeignModule], place: Place, asked: Asked, weights: "Weights | None" = None
    ) -> Foreign:
        """The adapter of these modules, with the base and the entries of its configuration that a LoRA has too."""
        demand_some(modules)
        config = place.config
        carried = {key: config[key] for key in _CARRIED if config.get(key)}
        base = text(config, "base_model_name_or_path") or asked.base
        return Foreign(self.program, modules, config=carried, base=base, weights=weights)


def by_module(names: Mapping[str, object], kinds: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """Module → kind → tensor, of tensors named `base_model.model.MODULE.KIND`. Refused for any other tensor."""
    found: dict[str, dict[str, str]] = {}
    others = []
    for name in names:
        kind = next((kind for kind in kinds if name.endswith(f".{kind}")), "")
        if kind and name.startswith(PREFIX):
            found.setdefault(name.removeprefix(PREFIX).removesuffix(f".{kind}"), {})[kind] = name
        else:
            others.append(name)
    if others:
        raise Refused(f"tensors that are not of this type: {others_in_words(others)}")
    return found


def settings_of(config: Mapping[str, Any]) -> LoraConfigFacts:
    """Ranks and alphas of a LyCORIS type as those of a LoRA, which PEFT finds by the same rules."""
    keys = {"r": "r", "alpha": "lora_alpha", "rank_pattern": "rank_pattern", "alpha_pattern": "alpha_pattern"}
    entries = {ours: config[theirs] for theirs, ours in keys.items() if config.get(theirs) is not None}
    return parse_config(json.dumps({"peft_type": "LORA", **entries}).encode())


def one_of(found: Mapping[str, str], kinds: tuple[str, ...], module: str) -> list[str]:
    """The tensors of these kinds. Refused where one is missing."""
    if missing := [kind for kind in kinds if kind not in found]:
        raise Refused(f"{shortened(module)} has no {missing[0]}")
    return [found[kind] for kind in kinds]
