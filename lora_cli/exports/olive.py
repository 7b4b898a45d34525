"""Olive, by the rules of 0.13: the file that `olive convert-adapters --adapter_format safetensors` makes.

Names of PEFT without its prefix, factors transposed, the scale in B.
"""

from lora_cli.exports import Export, Plan, Source
from lora_cli.exports._turned import TurnedPlan

_FILE = "adapter_weights.safetensors"


class Olive(Export):
    """ONNX models whose adapters Olive extracted."""

    program = "Olive"
    version = "0.13"

    def plan(self, source: Source, dtype: str) -> Plan:
        source.demand_linear(self.title)
        return TurnedPlan.of(
            source,
            dtype,
            outside=1.0,
            name=_FILE,
            names=lambda module: (f"{module}.lora_A.weight", f"{module}.lora_B.weight"),
        )


olive = Olive()
