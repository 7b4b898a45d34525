"""One file is one selection method."""

from lora_cli.methods import MethodFolder

METHODS = MethodFolder(__name__, "selection method")
