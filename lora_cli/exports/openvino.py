"""OpenVINO GenAI, by the rules of 2026.4: it reads the tensors of a PEFT folder and never its configuration.

`AdapterConfig` with alpha 1.0, its default, multiplies B·A by 1: the scale has to be in the factors.
"""

from lora_cli.exports import Export, Plan, Source
from lora_cli.exports._folder import FolderPlan


class Openvino(Export):
    """OpenVINO GenAI."""

    program = "OpenVINO GenAI"
    version = "2026.4"

    def plan(self, source: Source, dtype: str) -> Plan:
        source.demand_linear(self.title)
        ties = {} if source.skeleton is None else source.skeleton.ties
        notes = tuple(
            f"MODE_FUSE of {self.program} would change {ties[module][0]} too, whose weight {module} has"
            for module in source.modules
            if module in ties
        )
        return FolderPlan.of(source, dtype, notes=notes, scaled=False)


openvino = Openvino()
