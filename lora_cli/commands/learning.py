"""The validation examples of fit and train."""

from pathlib import Path
from typing import Annotated

from lora_cli.options import Flag, Options


class Validation(Options, frozen=True, kw_only=True):
    """The user's own validation examples."""

    valid: Annotated[
        Path | None,
        Flag(help="Task file whose examples choose the best step.", metavar="FILE", default="20 % of --data"),
    ] = None
