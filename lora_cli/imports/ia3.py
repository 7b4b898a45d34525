"""(IA)³ of PEFT: it multiplies rows or columns of the base's weights, so that its update is not in its file."""

from lora_cli.errors import Refused
from lora_cli.imports import Asked, Foreign, Found
from lora_cli.imports._peft_types import MERGE_AND_EXTRACT, PeftType


class Ia3(PeftType):
    """(IA)³ of PEFT."""

    program = "an (IA)³ of PEFT"
    peft_type = "IA3"

    def open(self, found: Found, asked: Asked) -> Foreign:
        raise Refused("its vectors multiply the base's weights: its update is not in its file", hint=MERGE_AND_EXTRACT)


ia3 = Ia3()
