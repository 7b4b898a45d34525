"""Devices for the arithmetic: the names of torch's devices, checked against this machine."""

import re

import torch

from lora_cli.errors import Refused, UsageError

_DEVICE = re.compile(r"(cpu|mps|cuda)(?::(\d{1,3}))?", re.ASCII)


def resolve_device(device: str = "auto") -> str:
    """cpu, cuda:N or mps for `device`; "auto" is cuda if there is one, else cpu.

    Raises:
        UsageError: an unknown name. Refused: this machine lacks the device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    match = _DEVICE.fullmatch(device)
    if match is None:
        raise UsageError(f"unknown device {device!r}", hint="one of auto, cpu, cuda, cuda:N, mps")
    kind, number = match[1], int(match[2] or 0)
    here = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if number >= here[kind]:
        raise Refused(f"device {device}: this machine has no such device", hint="use --device cpu or auto")
    return f"cuda:{number}" if kind == "cuda" else kind
