"""PEFT's own tensors where PEFT does not look for them: under another file name, or several adapters in one file."""

import re

from lora_cli.errors import Refused
from lora_cli.formats.header import TensorEntry
from lora_cli.formats.kinds import WEIGHTS_NAME
from lora_cli.imports import SAFETENSORS, Asked, Foreign, Found, Import, Place, Tensors, peft_config
from lora_cli.imports.diffusers import is_of_pipeline
from lora_cli.imports.olive import is_turned
from lora_cli.text import in_words, shortened

_FACTOR = re.compile(r"(.+\.lora_[AB])\.(?:([^.]+)\.)?weight")
_WHOLE_MODEL = re.compile(r"(?:(?:tf|pytorch|diffusion_pytorch)_)?model[.-]|consolidated[.-]|adapter_model-\d{5}-of-")


class Peft(Import):
    """An adapter of PEFT in a file of another name, or beside others in one file."""

    program = "an adapter of PEFT"
    several = True

    def recognises(self, place: Place) -> tuple[str, ...]:
        if WEIGHTS_NAME in place.names:
            return (WEIGHTS_NAME,) if len(_adapters(place, WEIGHTS_NAME)) > 1 else ()
        return tuple(name for name in place.names if name.endswith(SAFETENSORS) and _is_renamed(place, name))

    def open(self, found: Found, asked: Asked) -> Foreign:
        file, names = found.tensors, _adapters(found.place, found.weights[0])
        if asked.adapter and asked.adapter not in names:
            raise Refused(f"it has no adapter {asked.adapter!r}", hint=f"in it are {in_words(names) or 'no names'}")
        if len(names) > 1 and not asked.adapter:
            raise Refused(
                f"{len(names)} adapters in one file ({shortened(', '.join(names))})",
                hint=f"lora convert {found.place.path} --adapter {names[0]} takes one of them",
            )
        copied: dict[str, tuple[Tensors, TensorEntry]] = {}
        for name, entry in file.header.tensors.items():
            factor = _FACTOR.fullmatch(name)
            if factor is None or factor[2] in (None, *([asked.adapter] if asked.adapter else names)):
                ours = name if factor is None else f"{factor[1]}.weight"
                if ours in copied:
                    raise Refused(f"{shortened(ours)} is in it with an adapter's name and without one")
                copied[ours] = file, entry
        config = peft_config(found.place, asked)
        return Foreign(self.program, copied=copied, config=config, base=asked.base)


def _adapters(place: Place, name: str) -> list[str]:
    """The names of adapters in the names of a file's factors."""
    named = (_FACTOR.fullmatch(one) for one in place.tensor_names(name))
    return sorted({one[2] for one in named if one and one[2]})


def _is_renamed(place: Place, name: str) -> bool:
    if _WHOLE_MODEL.match(name) or not any(map(_FACTOR.fullmatch, place.tensor_names(name))):
        return False
    return not is_of_pipeline(place, name) and (place.has_config or not is_turned(place, name))


peft = Peft()
