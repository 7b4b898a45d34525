"""mlx-lm, by the rules of 0.32.2: transposed factors of one rank, and the scale as it is in `lora_parameters`.

mlx-lm makes a LoRA layer of every module whose name within its layer is a key, in the last `num_layers` layers (-1:
all); those without tensors in the file keep a B of zeros. Each tensor has to be one of these, of that rank.
"""

import json

from lora_cli.errors import Refused
from lora_cli.exports import Export, Plan, Source
from lora_cli.exports._turned import TurnedPlan
from lora_cli.formats.kinds import CONFIG_NAME
from lora_cli.names import layer_of

_STACK = "model.layers"
_FILE = "adapters.safetensors"


class Mlx(Export):
    """mlx-lm."""

    program = "mlx-lm"
    version = "0.32.2"

    def plan(self, source: Source, dtype: str) -> Plan:
        source.demand_linear(self.title)
        keys = set()
        for module in source.modules:
            layer = layer_of(module)
            if layer is None or layer.stack != _STACK or not layer.place:
                raise Refused(
                    f"{source.id}: {module} is outside {_STACK}, where {self.title} makes LoRA layers",
                    hint="leave it out: lora merge ADAPTER --scope modules=… keeps the others",
                )
            keys.add(layer.place)
        outside = source.scale or 1.0
        parameters = {"rank": source.rank, "scale": outside, "dropout": 0.0, "keys": sorted(keys)}
        config = {
            "model": source.base,
            "fine_tune_type": "lora",
            "num_layers": -1,
            "lora_parameters": parameters,
        }
        return TurnedPlan.of(
            source,
            dtype,
            outside=outside,
            name=_FILE,
            names=lambda module: (f"{module}.lora_a", f"{module}.lora_b"),
            texts={CONFIG_NAME: json.dumps(config, indent=2, sort_keys=True) + "\n"},
        )


mlx = Mlx()
