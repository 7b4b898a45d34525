"""PEFT's weights in parts: adapter_model-00001-of-00002.safetensors and so on, with or without an index."""

import re
from collections.abc import Collection

from lora_cli.errors import Refused
from lora_cli.files import read_regular, unreadable
from lora_cli.formats.config import MAX_CONFIG_BYTES, parse_json
from lora_cli.formats.header import TensorEntry
from lora_cli.formats.kinds import WEIGHTS_NAME
from lora_cli.imports import Asked, Foreign, Found, Import, Place, Tensors, peft_config
from lora_cli.text import shortened

_PART = re.compile(r"adapter_model-(\d{5})-of-(\d{5})\.safetensors")
_INDEX = f"{WEIGHTS_NAME}.index.json"


class Parts(Import):
    """An adapter of PEFT in parts."""

    program = "an adapter of PEFT in parts"
    split = True

    def recognises(self, place: Place) -> tuple[str, ...]:
        if WEIGHTS_NAME in place.names:
            return ()
        return tuple(name for name in place.names if _PART.fullmatch(name))

    def open(self, found: Found, asked: Asked) -> Foreign:
        numbers = [(int(part[1]), int(part[2])) for part in map(_PART.fullmatch, found.weights) if part]
        total = numbers[0][1]
        if sorted(numbers) != [(one, total) for one in range(1, total + 1)]:
            missing = sorted({*range(1, total + 1)} - {one for one, _ in numbers})
            raise Refused(
                f"part {missing[0]} of {total} is missing" if missing else "parts of several sets of weights",
                hint="fetch the missing files again",
            )
        tensors: dict[str, tuple[Tensors, TensorEntry]] = {}
        for name in found.weights:
            file = Tensors.of(found.place.folder / name)
            for tensor, entry in file.header.tensors.items():
                if tensor in tensors:
                    raise Refused(f"{shortened(tensor)} is in two parts")
                tensors[tensor] = file, entry
        _demand_indexed(found.place, tensors)
        return Foreign(self.program, copied=tensors, config=peft_config(found.place, asked), base=asked.base)


def _demand_indexed(place: Place, tensors: Collection[str]) -> None:
    """Refused for an index that names other tensors than the parts hold."""
    path = place.folder / _INDEX
    if not path.is_file():
        return
    try:
        mapped = parse_json(read_regular(path, MAX_CONFIG_BYTES + 1), _INDEX).get("weight_map")
    except OSError as error:
        raise unreadable(path, error) from error
    if not isinstance(mapped, dict) or mapped.keys() != {*tensors}:
        raise Refused(f"{_INDEX} names other tensors than the parts hold", hint="fetch the files again")


parts = Parts()
