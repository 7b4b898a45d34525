"""A plain PEFT folder of one rank: the form that every reader of PEFT folders applies in the same way."""

from lora_cli.exports import Export, Plan, Source
from lora_cli.exports._folder import FolderPlan


class Peft(Export):
    """PEFT, and whatever reads its folders."""

    program = "PEFT"
    version = "0.21"

    def plan(self, source: Source, dtype: str) -> Plan:
        return FolderPlan.of(source, dtype)


peft = Peft()
