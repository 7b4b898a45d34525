"""From an adapter's files to one LowRank per module, scale folded in; what cannot be represented is refused here."""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lora_cli.adapters.config import LoraConfigFacts, parse_config
from lora_cli.adapters.header import ModuleFactors, TensorEntry, lora_modules, read_header, reading, tensor_refusals
from lora_cli.adapters.lowrank import LowRank, bound
from lora_cli.adapters.store import AdapterFiles, Stamp, stamp
from lora_cli.errors import Refused
from lora_cli.records import AdapterRef

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
HEADROOM = 1e6
"""How far below the end of its precision an update's entries stay, for sums and norms of them to fit as well."""


@dataclass(frozen=True, slots=True, eq=False)
class OpenAdapter:
    """An adapter whose configuration and header were read and found representable.

    `modules` maps a module's name in the base model (`model.layers.0.self_attn.q_proj`) to its two factors.
    """

    files: AdapterFiles
    config: LoraConfigFacts
    modules: dict[str, ModuleFactors] = field(repr=False)
    stamp: Stamp = field(repr=False)
    """That of the weights' file when it was opened."""

    @property
    def ref(self) -> AdapterRef:
        """Which adapter this is."""
        return self.files.ref

    @property
    def base(self) -> str:
        """The base model that it declares, with `@revision` where it names one."""
        return self.config.pinned_base

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether it says that the base stores its weights (in, out)."""
        return self.config.fan_in_fan_out

    @property
    def folder(self) -> Path:
        """Where its files stand."""
        return self.files.weights.parent

    def shape(self, module: str) -> tuple[int, int]:
        """(out, in) of one module."""
        return self.modules[module].out_features, self.modules[module].in_features

    @property
    def dtypes(self) -> set[torch.dtype]:
        """The precisions its factors are stored in."""
        return {DTYPES[entry.dtype] for factors in self.modules.values() for entry in (factors.a, factors.b)}

    def scale(self, module: str) -> float:
        """alpha/rank (alpha/√rank for rslora) in one module: what `read` folds into B."""
        return self.config.scale(module, self.modules[module].rank)

    def read(self, module: str, dtype: torch.dtype = torch.float32) -> LowRank:
        """The update of one module, alpha/rank (or alpha/√rank) folded into B. Reads only that module's bytes.

        Raises:
            Refused: a factor holds NaN, Inf, or values so large that their product overflows; another file than was
                opened, or one that was written to since.
            DataError: the file is gone.
            KeyError: the adapter does not touch `module`.
        """
        factors = self.modules[module]
        with reading(self.files.weights), self.files.weights.open("rb", buffering=0) as file:
            if stamp(os.fstat(file.fileno())) != self.stamp:
                raise Refused(f"{self.ref.id}: its weights changed while they were used", hint="run this again")
            a = read_tensor(file.fileno(), factors.a, dtype)
            b = read_tensor(file.fileno(), factors.b, dtype)
        scale = self.scale(module)
        largest = bound(LowRank(b, a))
        if not math.isfinite(largest):
            raise Refused(f"{self.ref.id}: NaN or Inf in {module}", hint="leave this adapter out")
        if not largest * abs(scale) <= torch.finfo(dtype).max / HEADROOM:
            raise Refused(f"{self.ref.id}: values of {module} are too large to compute with", hint="leave it out")
        return LowRank(b.mul_(scale), a)


def open_adapter(files: AdapterFiles) -> OpenAdapter:
    """Read configuration and header of an adapter; its weights stay on disk.

    Raises:
        ConfigError, HeaderError: a file is malformed.
        Refused: the update is not s·B·A (DoRA, bias, saved heads, …), each reason by name.
    """
    name = files.ref.id
    with reading(files.weights):
        opened = stamp(files.weights.stat())
    config = parse_config(_bytes(files.config, name))
    header = read_header(files.weights)
    modules, _ = lora_modules(header)
    reasons = [*config.refusals(), *tensor_refusals(header)]
    if reasons:
        raise Refused(f"{name}: {'; '.join(reasons)}")
    if not modules:
        raise Refused(f"{name}: no LoRA tensors")
    return OpenAdapter(files, config, modules, opened)


def all_modules(adapters: Iterable[OpenAdapter]) -> list[str]:
    """Every module that one of `adapters` touches, in natural order (layer 2 before layer 10)."""
    return natural({module for adapter in adapters for module in adapter.modules})


def natural(modules: Iterable[str]) -> list[str]:
    """`modules` in natural order."""
    return sorted(modules, key=_parts)


def _parts(module: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in module.split(".")]


def read_tensor(descriptor: int, entry: TensorEntry, dtype: torch.dtype) -> Tensor:
    """One tensor of an open file, in `dtype`. Refused where the file ends inside it."""
    data = bytearray(entry.end - entry.begin)
    view, done = memoryview(data), 0
    while done < len(data):
        count = os.preadv(descriptor, [view[done:]], entry.begin + done)
        if count == 0:
            raise Refused(f"{entry.name}: the file ends inside this tensor")
        done += count
    return torch.frombuffer(data, dtype=DTYPES[entry.dtype]).reshape(entry.shape).to(dtype)


def _bytes(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise Refused(f"{name}: {path.name} cannot be read ({error.strerror})") from error
