"""Olive 0.13, `olive convert-adapters --adapter_format safetensors`: one file of PEFT's tensors, turned.

`NAME.lora_A.weight` is (in, r), `NAME.lora_B.weight` (r, out), and the scale is in B: ΔW = (lora_A·lora_B)ᵀ. The prefix
`base_model.model.` stays only in front of names that do not begin with `model.` behind it.
"""

from lora_cli.errors import Refused
from lora_cli.formats.factors import PREFIX
from lora_cli.formats.kinds import WEIGHTS_NAME
from lora_cli.imports import SAFETENSORS, Asked, Foreign, Found, Import, Place, demand_some, others_in_words
from lora_cli.imports._pairs import dtypes_of, paired, turned

_ENDS = (".lora_A.weight", ".lora_B.weight")
_INT4 = ".quant."


class Olive(Import):
    """An adapter for ONNX Runtime, written by Olive."""

    program = "an adapter of Olive"

    def recognises(self, place: Place) -> tuple[str, ...]:
        if place.has_config:
            return ()
        found = [name for name in place.names if name.endswith(SAFETENSORS) and name != WEIGHTS_NAME]
        return (found[0],) if len(found) == 1 and is_turned(place, found[0]) else ()

    def open(self, found: Found, asked: Asked) -> Foreign:
        file = found.tensors
        if any(_INT4 in name for name in file.header.tensors):
            raise Refused("its factors are quantised to int4", hint="convert it without --quantize_int4")
        pairs, others = paired(file.header.tensors, _ENDS)
        if others:
            raise Refused(f"tensors that are no factors: {others_in_words(others)}")
        modules = {name.removeprefix(PREFIX): turned(file, a, b, scale=1.0) for name, (a, b) in pairs.items()}
        if len(modules) < len(pairs):
            raise Refused("two of its modules have one name without PEFT's prefix")
        demand_some(modules)
        return Foreign(self.program, modules, dtypes_of(file, pairs), base=asked.base)


def is_turned(place: Place, name: str) -> bool:
    """Whether the factors in a file fit together turned, and not as PEFT has them."""
    names = [*place.tensor_names(name)]
    if any(".lora_A.quant." in one or ".lora_B.quant." in one for one in names):
        return True
    tensors = place.header(name).tensors if names else {}
    straight = turned = 0
    for one, entry in tensors.items():
        other = tensors.get(one.removesuffix(_ENDS[0]) + _ENDS[1]) if one.endswith(_ENDS[0]) else None
        if other is None or len(entry.shape) != 2 or len(other.shape) != 2:
            continue
        # The rank as PEFT has it and turned: those of a square module both fit, and the lower one is meant.
        ranks = [(0, entry.shape[0])] if entry.shape[0] == other.shape[1] else []
        ranks += [(1, entry.shape[1])] if entry.shape[1] == other.shape[0] else []
        meant = [way for way, rank in ranks if rank == min(rank for _, rank in ranks)]
        straight += meant == [0]
        turned += meant == [1]
    return turned > straight


olive = Olive()
