"""OFT of PEFT: it rotates the inputs of the base's weights, so that its update is not in its file."""

from lora_cli.errors import Refused
from lora_cli.imports import Asked, Foreign, Found
from lora_cli.imports._peft_types import MERGE_AND_EXTRACT, PeftType


class Oft(PeftType):
    """OFT of PEFT."""

    program = "an OFT of PEFT"
    peft_type = "OFT"

    def open(self, found: Found, asked: Asked) -> Foreign:
        raise Refused("it rotates the base's weights: its update is not in its file", hint=MERGE_AND_EXTRACT)


oft = Oft()
