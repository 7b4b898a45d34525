"""One file is one metric."""

from lora_cli.methods import MethodFolder

METRICS = MethodFolder(__name__, "metric")
