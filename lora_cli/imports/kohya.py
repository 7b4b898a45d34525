"""kohya-ss/sd-scripts, and the programs that write as it does: one file of flattened names.

`NAME.lora_down.weight` is (r, in) and `NAME.lora_up.weight` (out, r), with the kernel of a convolution behind.
`NAME.alpha` is a number, and ΔW = alpha/r·up·down. A file without any alpha is applied at scale 1, as sd-scripts does.
`NAME` is kept as it is: lora_unet_…, lora_te_…. sd-scripts writes the model into the file's metadata.
"""

from dataclasses import replace

from lora_cli.errors import Refused
from lora_cli.formats.factors import PREFIX
from lora_cli.formats.header import Header
from lora_cli.imports import SAFETENSORS, Asked, Foreign, Found, Import, Place, demand_some, others_in_words
from lora_cli.imports._pairs import dtypes_of, paired, scales, straight

_ENDS = (".lora_down.weight", ".lora_up.weight")
_ALPHA = ".alpha"
_FORMS = {
    ".dora_scale": "DoRA: weights are rescaled by a trained magnitude",
    ".lora_mid.weight": "a third factor stands between up and down (lora_mid)",
    ".diff": "whole updates beside the factors (diff)",
    ".diff_b": "biases were trained (diff_b)",
}
_MODELS = ("modelspec.architecture", "ss_base_model_version", "ss_sd_model_name")
_MOST = 200


class Kohya(Import):
    """A LoRA file of kohya's scripts."""

    program = "an adapter of kohya"

    def recognises(self, place: Place) -> tuple[str, ...]:
        return tuple(
            name
            for name in place.names
            if name.endswith(SAFETENSORS) and any(one.endswith(_ENDS) for one in place.tensor_names(name))
        )

    def open(self, found: Found, asked: Asked) -> Foreign:
        file = found.tensors
        pairs, others = paired(file.header.tensors, _ENDS)
        for end, reason in _FORMS.items():
            if any(name.endswith(end) for name in others):
                raise Refused(reason)
        left = [name for name in others if not name.endswith(_ALPHA) or name.removesuffix(_ALPHA) not in pairs]
        if left:
            raise Refused(f"tensors that are no factors: {others_in_words(left)}")
        layers = {name: straight(file, a, b) for name, (a, b) in pairs.items()}
        found_scales, given = scales(file, {name: layer.rank for name, layer in layers.items()})
        modules = {
            name.removeprefix(PREFIX): replace(layer, scale=found_scales[name]) for name, layer in layers.items()
        }
        demand_some(modules)
        return Foreign(
            kind=self.program,
            modules=modules,
            dtypes=dtypes_of(file, pairs),
            base=_model(file.header) or asked.base,
            notes=() if given else ("it gives no alpha: sd-scripts applies it at scale 1",),
        )


def _model(header: Header) -> str:
    """The model in a file's metadata, "" for none."""
    for key in _MODELS:
        value = header.metadata.get(key, "").removesuffix("/lora")
        if value and value != "None" and len(value) <= _MOST and value.isprintable():
            return value
    return ""


kohya = Kohya()
