"""From an adapter's files to one LowRank per matrix, scale folded in; adapters of another form are refused here.

torch is imported when a LowRank or a tensor is asked for: an adapter is opened, and its numbers are read, without it.
"""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lora_cli.errors import Refused
from lora_cli.files import read_regular
from lora_cli.formats.config import parse_config
from lora_cli.formats.factors import TAKE_THE_UPDATE, AnyFactors, FusedFactors, ModuleFactors, parts_of, whole_reason
from lora_cli.formats.facts import TASKS_WITH_A_HEAD, LoraConfigFacts
from lora_cli.formats.header import TensorEntry, read_header
from lora_cli.formats.modules import fused, locate_modules
from lora_cli.formats.numbers import KINDS, StoredTensor
from lora_cli.formats.skeleton import OWN, Skeleton, Spelling
from lora_cli.formats.store import AdapterFiles
from lora_cli.hashes import Stamp, opened_as, stamp_of
from lora_cli.precision import torch_dtype
from lora_cli.records import AdapterRef

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lora_cli.algebra.lowrank import LowRank
    from lora_cli.formats.numbers import Numbers

_HELD_STACKS = 4
HEADROOM = 1e6
"""The margin between an update's entries and the limit of the precision, so that sums and norms fit too."""


class Factors(NamedTuple):
    """A module's update B @ A in numbers: `B` (out, r), `A` (r, in), each fp32, or fp64 where the file has fp64."""

    B: "Numbers"
    A: "Numbers"


@dataclass(frozen=True, slots=True, eq=False)
class OpenAdapter:
    """An adapter whose configuration and header were read and found representable.

    `modules` maps a matrix's name in the base model (`model.layers.0.self_attn.q_proj`, or of an expert
    `model.layers.0.mlp.experts.3.down_proj`) to its factors. `saved` are tensors of modules that were saved as they
    are beside the update, which is not the whole adapter then; `notes` list repairs and omissions.
    """

    files: AdapterFiles
    config: LoraConfigFacts
    modules: Mapping[str, AnyFactors] = field(repr=False)
    scales: Mapping[str, float] = field(repr=False)
    """alpha/rank (alpha/√rank for rslora) of every module: `read` multiplies B by it."""
    stamp: Stamp = field(repr=False)
    """The identity of the weights' file when it was opened."""
    saved: Mapping[str, TensorEntry] = field(repr=False, default_factory=dict)
    notes: tuple[str, ...] = ()
    spelling: Spelling = OWN
    """The spelling of the class that the adapter was trained on."""
    copies: Mapping[str, TensorEntry] = field(repr=False, default_factory=dict)
    """Tensors of the base that were saved beside their layers' factors, by the base's names."""
    ref: AdapterRef = field(init=False)
    _stacks: "_Stacks" = field(repr=False, default_factory=lambda: _Stacks())

    def __post_init__(self) -> None:
        object.__setattr__(self, "ref", self.files.ref)

    @property
    def base(self) -> str:
        """The declared base model, with `@revision` if one is declared."""
        return self.config.pinned_base

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the adapter declares that the base stores its weights (in, out)."""
        return self.config.fan_in_fan_out

    @property
    def folder(self) -> Path:
        """The folder of the adapter's files."""
        return self.files.weights.parent

    def shape(self, module: str) -> tuple[int, int]:
        """(out, in) of one module."""
        return self.modules[module].out_features, self.modules[module].in_features

    @property
    def dtypes(self) -> set[str]:
        """The precisions its factors are stored in, as safetensors names them."""
        return {entry.dtype for part in parts_of(self.modules.values()) for entry in (part.a, part.b)}

    def read(self, module: str, dtype: "torch.dtype | None" = None, *, checked: bool = True) -> "LowRank":
        """The update of one module, alpha/rank (or alpha/√rank) folded into B. Reads only that module's bytes.

        Args:
            dtype: of the factors, None for fp32.
            checked: False to take whatever numbers the file holds, NaN, Inf and those that overflow too.

        Raises:
            Refused: a factor holds NaN, Inf, or values so large that their product overflows; another file than was
                opened, or one that was written to since.
            DataError: the file is gone.
            KeyError: the adapter does not touch `module`.
        """
        import torch

        from lora_cli.algebra.lowrank import LowRank, bound

        dtype = dtype or torch.float32
        parts = self._parts(module)
        if len(parts) == 1:
            update = LowRank(*(tensor_of(one, dtype) for one in parts[0]))
        else:
            update = LowRank(*(torch.from_numpy(one).to(dtype) for one in self._joined(module, parts)))
        if checked:
            self._demand_sound(module, bound(update), torch.finfo(torch.promote_types(dtype, torch.float32)).max)
        update.B.mul_(self.scales[module])
        return update

    def numbers(self, module: str) -> Factors:
        """B and A of one module as they are stored, without the scale. Raises as `read` does."""
        found = self._joined(module, self._parts(module))
        largest = found.A.shape[0] * _largest(found.A) * _largest(found.B)
        self._demand_sound(module, largest, float(np.finfo(np.result_type(found.A, found.B)).max))
        return found

    def _parts(self, module: str) -> "list[tuple[StoredTensor, StoredTensor]]":
        """B and A of each part of a module as they act: matrices, of fused experts those of one expert."""
        with opened_as(self.files.weights, self.stamp, f"{self.ref.id}: its weights") as file:
            return [_read_part(file.fileno(), part, self._stacks) for part in self.modules[module].parts]

    def _joined(self, module: str, parts: "Sequence[tuple[StoredTensor, StoredTensor]]") -> Factors:
        """The numbers of the parts, each some of the rows of B, as those of one update of all rows."""
        each = [Factors(b.numbers, a.numbers) for b, a in parts]
        if len(each) == 1:
            return each[0]
        factors, at = self.modules[module], 0
        kind = np.result_type(*(one.B for one in each))
        b = np.zeros((factors.out_features, sum(one.B.shape[1] for one in each)), kind)
        for part, row in zip(each, factors.rows, strict=True):
            b[row : row + part.B.shape[0], at : at + part.B.shape[1]] = part.B
            at += part.B.shape[1]
        return Factors(b, np.concatenate([one.A for one in each]))

    def _demand_sound(self, module: str, largest: float, most: float) -> None:
        """Refused for a bound on an update's entries that is not finite, or too near to the `most` of a precision."""
        if not math.isfinite(largest):
            raise Refused(f"{self.ref.id}: NaN or Inf in {module}", hint="leave this adapter out")
        if not largest * abs(self.scales[module]) <= most / HEADROOM:
            raise Refused(f"{self.ref.id}: values of {module} are too large to compute with", hint="leave it out")


class _Stacks:
    """The last factors B of fused experts that were read: every expert has columns in all of it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._held: dict[str, StoredTensor] = {}

    def read(self, descriptor: int, entry: TensorEntry) -> StoredTensor:
        """A tensor, from the file unless it is one of the last few. The caller may not write to it."""
        with self._lock:
            if entry.name not in self._held:
                while len(self._held) >= _HELD_STACKS:
                    self._held.pop(next(iter(self._held)))
                self._held[entry.name] = read_stored(descriptor, entry)
            return self._held[entry.name]


def _read_part(descriptor: int, part: ModuleFactors, stacks: _Stacks) -> tuple[StoredTensor, StoredTensor]:
    """One pair of factors as they act, B (out, r) and A (r, in); of fused experts those of one expert."""
    if part.experts == 1:
        b, a = (read_stored(descriptor, entry) for entry in (part.b, part.a))
        return _matrix(b), _matrix(a)
    # A is grouped by expert, B by rank.
    size = (part.a.end - part.a.begin) // part.experts
    begin = part.a.begin + part.expert * size
    rows = replace(part.a, shape=(part.rank, part.in_features), begin=begin, end=begin + size)
    bits, dtype = stacks.read(descriptor, part.b)
    own = bits.reshape(part.out_features, part.rank, part.experts)[:, :, part.expert]
    return StoredTensor(own.copy(), dtype), read_stored(descriptor, rows)


def _matrix(factor: StoredTensor) -> StoredTensor:
    """A factor with all dimensions behind the first as one: that of a convolution as a matrix."""
    return StoredTensor(factor.bits.reshape(len(factor.bits), math.prod(factor.bits.shape[1:])), factor.dtype)


def _largest(numbers: "Numbers") -> float:
    """The largest magnitude, NaN if a number is NaN; 0 of none."""
    return max(-float(numbers.min()), float(numbers.max())) if numbers.size else 0.0


def open_adapter(
    files: AdapterFiles, base: Skeleton | None = None, *, fuse: bool = False, whole: bool = False
) -> OpenAdapter:
    """Read configuration and header of an adapter; its weights stay on disk.

    Args:
        base: the modules of its base model, if known: modules then go by the base's own names, and modules that the
            base lacks are refused.
        fuse: factors of the parts of an expert's matrix as those of the whole matrix; needs `base`.
        whole: also open an adapter with modules saved whole, whose factors are not the whole adapter.

    Raises:
        ConfigError, HeaderError: a file is malformed.
        Refused: the update is not s·B·A (DoRA, bias, …), its factors are not those of its configuration, or do not fit
            the base; each reason by name.
    """
    name = files.ref.id
    opened = stamp_of(files.weights)
    config = parse_config(_bytes(files.config, name))
    located = locate_modules(config, read_header(files.weights), base)
    reasons = [*config.refusals(), *located.refusals]
    beside = "" if whole else whole_reason(located.whole)
    if reasons or beside:
        hint = "" if reasons else TAKE_THE_UPDATE
        raise Refused(f"{name}: {'; '.join(filter(None, [*reasons, beside]))}", hint=hint)
    if located.conflict:
        assert base is not None
        hint = "use the adapter with the base model it was trained on"
        if located.modules and config.task_type in TASKS_WITH_A_HEAD:
            hint = f"it was trained for {config.task_type}: give a --base whose config.json names the class for that"
        raise Refused(f"{name} does not fit {base.architecture}: {located.conflict}", hint=hint)
    if fuse and base is not None:
        located = fused(located, base)
    return OpenAdapter(
        files,
        config,
        located.modules,
        _scales(config, located.modules),
        opened,
        saved=located.saved,
        notes=located.notes,
        spelling=located.spelling,
        copies=located.copies,
    )


def _scales(config: LoraConfigFacts, modules: Mapping[str, AnyFactors]) -> dict[str, float]:
    firsts = [one.parts[0] if isinstance(one, FusedFactors) else one for one in modules.values()]
    return dict(zip(modules, config.scales((one.pattern, one.rank) for one in firsts), strict=True))


def all_modules(adapters: Iterable[OpenAdapter]) -> list[str]:
    """Every module that one of `adapters` touches, in natural order (layer 2 before layer 10)."""
    return natural({module for adapter in adapters for module in adapter.modules})


def natural(modules: Iterable[str]) -> list[str]:
    """`modules` in natural order."""
    return sorted(modules, key=_parts)


def _parts(module: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in module.split(".")]


def read_stored(descriptor: int, entry: TensorEntry) -> StoredTensor:
    """One tensor of an open file. Refused where the file ends inside it. KeyError: a type that is not in `FACTORS`."""
    bits = np.empty(math.prod(entry.shape), KINDS[entry.dtype])
    view, done = bits.view(np.uint8).data, 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], entry.begin + done)
        if count == 0:
            raise Refused(f"{entry.name}: the file ends inside this tensor")
        done += count
    return StoredTensor(bits.reshape(entry.shape), entry.dtype)


def read_tensor(descriptor: int, entry: TensorEntry, dtype: "torch.dtype") -> "Tensor":
    """One tensor of an open file, in `dtype`. Refused where the file ends inside it."""
    return tensor_of(read_stored(descriptor, entry), dtype)


def tensor_of(stored: StoredTensor, dtype: "torch.dtype") -> "Tensor":
    """What a file holds as a tensor in `dtype`."""
    import torch

    # Shaped last: a matrix of one row or column may have any strides, and a view in another type minds them.
    flat = torch.from_numpy(stored.bits.reshape(-1)).view(torch_dtype(stored.dtype))
    return flat.reshape(stored.bits.shape).to(dtype)


def _bytes(path: Path, name: str) -> bytes:
    try:
        return read_regular(path)
    except OSError as error:
        raise Refused(f"{name}: {path.name} cannot be read ({error.strerror})") from error


def shapes_of(adapters: Sequence[OpenAdapter]) -> dict[str, tuple[int, int]]:
    """(out, in) of every module of `adapters`."""
    return {module: adapter.shape(module) for adapter in adapters for module in adapter.modules}


def demand_same_shapes(adapters: Sequence[OpenAdapter], modules: Sequence[str]) -> None:
    """Refused where adapters disagree about the kind or the shape of a module."""
    for module in modules:
        shapes: dict[tuple[int, int], str] = {}
        kinds: dict[str, str] = {}
        for adapter in adapters:
            if factors := adapter.modules.get(module):
                shapes.setdefault((factors.out_features, factors.in_features), adapter.ref.id)
                kinds.setdefault(factors.form, adapter.ref.id)
        if len(kinds) > 1:
            (form, first), (another, second) = list(kinds.items())[:2]
            raise Refused(
                f"{module} has factors of {form} in {first} but of {another} in {second}",
                hint="these adapters belong to different base models",
            )
        if len(shapes) > 1:
            (one, first), (other, second) = list(shapes.items())[:2]
            raise Refused(
                f"{module} is {one[0]}×{one[1]} in {first} but {other[0]}×{other[1]} in {second}",
                hint="these adapters belong to different base models",
            )
