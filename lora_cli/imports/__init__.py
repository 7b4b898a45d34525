"""Adapters that other programs write. One file is one way of writing: an object of the file's name.

An `Import` recognises a place by the names of its files, by headers and by configurations. It opens it as a `Foreign`
adapter, whose modules are read one at a time. `_written.py` makes a PEFT folder of it.
"""

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_cli.errors import DataError, HeaderError, LoraError, NothingMatched, Refused
from lora_cli.files import read_regular, special_kind, unreadable
from lora_cli.formats.config import MAX_CONFIG_BYTES, parse_config, parse_json
from lora_cli.formats.header import Header, TensorEntry, read_header
from lora_cli.formats.kinds import CONFIG_NAME, PICKLE_SUFFIXES, WEIGHTS_NAME, checkpoints_in, kind_in
from lora_cli.formats.skeleton import Kind, Skeleton
from lora_cli.hashes import Stamp, opened_as, stamp_of
from lora_cli.methods import file_names, member
from lora_cli.precision import FLOATS
from lora_cli.settings import folder_of
from lora_cli.text import counted, in_words, shortened

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lora_cli.algebra.lowrank import LowRank
    from lora_cli.formats.numbers import StoredTensor
    from lora_cli.imports._on_base import Weights

SAFETENSORS = ".safetensors"
_ONE_FILE = (SAFETENSORS, ".gguf")


@dataclass(frozen=True)
class Place:
    """A folder, or one file in it, that may hold a foreign adapter.

    `names` are the names of the folder's regular files that are meant: all of them, or the one that the user named.
    """

    folder: Path
    names: tuple[str, ...]
    one: bool = False

    @property
    def path(self) -> Path:
        """The folder, or the one file that the user named."""
        return self.folder / self.names[0] if self.one else self.folder

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The folder's adapter_config.json, {} where there is none. ConfigError for a malformed one."""
        path = self.folder / CONFIG_NAME
        try:
            return parse_json(read_regular(path, MAX_CONFIG_BYTES + 1)) if self.has_config else {}
        except OSError as error:
            raise unreadable(path, error) from error

    @property
    def has_config(self) -> bool:
        """Whether an adapter_config.json lies in the folder."""
        return (self.folder / CONFIG_NAME).is_file()

    @property
    def peft_type(self) -> str:
        """The type that the configuration declares, "" where none can be read."""
        try:
            named = self.config.get("peft_type")
        except LoraError:
            return ""
        return named.upper() if isinstance(named, str) else ""

    def header(self, name: str) -> Header:
        """The header of one of its safetensors files. HeaderError, DataError where it cannot be read."""
        return read_header(self.folder / name)

    def tensor_names(self, name: str) -> Iterable[str]:
        """The names of a file's tensors, none where they cannot be read."""
        if not name.endswith(SAFETENSORS):
            return ()
        try:
            return self.header(name).tensors
        except (HeaderError, DataError):
            return ()


class Asked(NamedTuple):
    """What the user says about a foreign adapter beside its place.

    `base` is the base model of an adapter that declares none, "" if it is not known. `folder` is the base's folder,
    None if it is not on this machine, and `skeleton` finds its modules. `adapter` is the one of several in a file.
    `weights` opens the base's weights of some modules, None unless base and rank are asked for.
    """

    base: str = ""
    folder: Path | None = None
    adapter: str = ""
    skeleton: Callable[[], Skeleton | None] | None = None
    weights: "Callable[[Collection[str]], Weights] | None" = None


@dataclass(frozen=True, slots=True)
class ForeignModule:
    """The update s·B·A of one module: `shape` (out, in), the rank of B·A, and the scale s.

    `read` gives B and A in the precision of the file. `best(rank)` gives the best approximation of this rank where the
    kind knows a shorter way to it than from B and A, and the squared norms of B·A and of what it keeps. `computed`: the
    file holds other numbers than these factors.
    """

    shape: tuple[int, int]
    rank: int
    read: "Callable[[], LowRank]"
    scale: float = 1.0
    kind: Kind = "linear"
    kernel: tuple[int, ...] = ()
    computed: bool = False
    best: "Callable[[int], tuple[LowRank, float, float]] | None" = None


@dataclass(frozen=True, slots=True)
class Foreign:
    """An adapter of another program that was found representable; its weights stay on disk.

    `kind` says what it is, in words. `dtypes` are the precisions of its factors, as safetensors names them. `config`
    holds entries of PEFT's configuration other than ranks, alpha and modules. With `copied`, the tensors are those of
    PEFT already: they go into one file as they are, under `config`. `weights` are the base's, where they are read too.
    """

    kind: str
    modules: Mapping[str, ForeignModule] = field(default_factory=dict)
    dtypes: frozenset[str] = frozenset()
    base: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    copied: "Mapping[str, tuple[Tensors, TensorEntry]]" = field(default_factory=dict)
    weights: "Weights | None" = None


class Import(ABC):
    """One way of writing adapters, which `program` names in words.

    `several`: one file can hold several adapters by name. `split`: several files hold one adapter together.
    """

    program: str
    several: bool = False
    split: bool = False

    @abstractmethod
    def recognises(self, place: Place) -> tuple[str, ...]:
        """The files that hold the weights of an adapter written in this way, sound or broken; () for none.

        Raises nothing.
        """

    @abstractmethod
    def open(self, found: "Found", asked: Asked) -> Foreign:
        """The adapter, after every check that needs no weights.

        Raises:
            Refused: an update that is not s·B·A, or a file that does not say what it is; each reason by name.
            ConfigError, HeaderError, DataError: a file that is malformed or cannot be read.
        """


class Found(NamedTuple):
    """A place, the way in which its adapter is written, and the files that hold the weights."""

    place: Place
    by: Import
    weights: tuple[str, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that decide the adapter."""
        config = self.place.folder / CONFIG_NAME
        return (*(self.place.folder / name for name in self.weights), *([config] if config.is_file() else []))

    @property
    def adapters(self) -> list[Path]:
        """The paths that name single adapters: the place, or the files in it that hold one each."""
        if self.by.split or len(self.weights) == 1:
            return [self.place.path]
        return [self.place.folder / name for name in self.weights]

    @property
    def tensors(self) -> "Tensors":
        """The tensors of its only weights file.

        Raises:
            Refused: several files, each an adapter. HeaderError, DataError: a file that cannot be read.
        """
        if len(self.weights) > 1:
            raise Refused(
                f"{len(self.weights)} adapters beside each other ({shortened(', '.join(self.weights))})",
                hint=f"name one, such as {self.place.folder / self.weights[0]}",
            )
        return Tensors.of(self.place.folder / self.weights[0])

    def open(self, asked: Asked | None = None) -> Foreign:
        """`Import.open`, with the kind in front of its errors."""
        with self.named():
            return self.by.open(self, asked or Asked())

    @contextmanager
    def named(self) -> Iterator[None]:
        """Put the kind in front of an error about the adapter."""
        with after(self.by.program):
            yield


@contextmanager
def after(words: str) -> Iterator[None]:
    """Put words and a colon in front of an error about an adapter."""
    try:
        yield
    except (Refused, DataError) as error:
        raise prefixed(words, error) from error


def prefixed(words: str, error: Refused | DataError) -> Refused | DataError:
    """The error with words and a colon in front."""
    return type(error)(f"{words}: {error.message}", hint=error.hint)


def imports() -> list[Import]:
    """Every way of the folder."""
    return [member(__name__, name) for name in file_names(__name__)]


def find(path: Path) -> Found | None:
    """The foreign adapter in a folder, or in one file; None where no way of writing fits."""
    place = _place(path)
    if place is None:
        return None
    found = ((one, one.recognises(place)) for one in imports())
    return next((Found(place, one, weights) for one, weights in found if weights), None)


def file_of(text: str) -> Path | None:
    """The file of a foreign adapter that a text names, None where it names none. Never raises."""
    path = os.path.expanduser(text)  # noqa: PTH111 - see settings.folder_of
    named = path.endswith(_ONE_FILE) and os.path.isfile(path)  # noqa: PTH113
    return Path(path) if named else None


def demand(path: Path) -> Found:
    """`find`, or the error for a place without a foreign adapter.

    Raises:
        NothingMatched: no such file or folder. Refused: a place that holds none.
    """
    if (found := find(path)) is not None:
        return found
    if not path.exists():
        raise NothingMatched(f"no file or folder {path}")
    if named := checkpoints_in(path):
        listed = in_words(named[-3:])
        raise Refused(f"{path} holds checkpoints, not an adapter: {listed}", hint=f"name one: {path / named[-1]}")
    _demand_no_special(path)
    place = _place(path) or Place(path, ())
    kind = "" if place.one else kind_in(place.folder, place.names)
    if pickle := next((name for name in place.names if name.endswith(PICKLE_SUFFIXES)), ""):
        raise Refused(f"{path}: {kind or f'pickle only ({pickle})'}", hint=unpickled(pickle, WEIGHTS_NAME))
    if WEIGHTS_NAME in place.names and place.has_config:
        with after(f"{path}: {WEIGHTS_NAME}"):
            place.header(WEIGHTS_NAME)
        with after(str(path)):
            reasons = parse_config(json.dumps(place.config).encode()).refusals()
        kind = next(iter(reasons), "an adapter as PEFT writes it: nothing to convert")
    raise Refused(
        f"{path}: {kind or 'no adapter of a known program'}",
        hint="docs/exchange.md lists the kinds that lora convert reads",
    )


def _demand_no_special(path: Path) -> None:
    """Refused for a pipe, a device or a socket under the name of an adapter's file: none is opened.

    DataError for a folder that cannot be read.
    """
    try:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
    except OSError as error:
        raise unreadable(path, error) from error
    for file in files:
        if (file.name == CONFIG_NAME or file.suffix in _ONE_FILE) and (special := special_kind(file)):
            raise Refused(f"{file}: {special}, not a file", hint="copy the file itself there")


def _place(path: Path) -> Place | None:
    folder = folder_of(str(path))
    try:
        if folder is None:
            return Place(path.parent, (path.name,), one=True) if path.is_file() else None
        return Place(folder, tuple(sorted(file.name for file in folder.iterdir() if file.is_file())))
    except OSError:
        return None


@dataclass(frozen=True)
class Tensors:
    """The tensors of one safetensors file, read on demand as long as the file stays as it was."""

    path: Path
    header: Header
    stamp: Stamp

    @classmethod
    def of(cls, path: Path) -> "Tensors":
        """Those of the file at `path`. HeaderError, DataError where it cannot be read."""
        stamp = stamp_of(path)
        return cls(path, read_header(path), stamp)

    def stored(self, name: str) -> "StoredTensor":
        """One tensor as the file holds it. Refused for a file that changed."""
        from lora_cli.formats.reader import read_stored

        with opened_as(self.path, self.stamp, f"{self.path}: its weights") as file:
            return read_stored(file.fileno(), self.header.tensors[name])

    def read(self, name: str, dtype: "torch.dtype | None" = None) -> "Tensor":
        """One tensor in its own precision, or in `dtype`. Refused for NaN or Inf, or a file that changed."""
        import torch

        from lora_cli.formats.reader import tensor_of
        from lora_cli.precision import torch_dtype

        stored = self.stored(name)
        found = tensor_of(stored, dtype or torch_dtype(stored.dtype))
        if not torch.isfinite(found).all():
            raise Refused(f"NaN or Inf in {shortened(name)}", hint="leave this adapter out")
        return found


def demand_floats(entries: Iterable[TensorEntry]) -> None:
    """Refused for a tensor that is stored as anything but fp16, bf16, fp32 or fp64."""
    for entry in entries:
        if entry.dtype not in FLOATS:
            raise Refused(f"{shortened(entry.name)} is stored as {entry.dtype}; factors must be {', '.join(FLOATS)}")


def demand_some(modules: Mapping[str, ForeignModule]) -> None:
    """Refused for an adapter without a module."""
    if not modules:
        raise Refused("no factors in it")


def number(config: Mapping[str, Any], key: str, where: str) -> float:
    """A finite number of a configuration. Refused where it is missing or something else."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        said = "is missing" if value is None else f"is {shortened(json.dumps(value))}, not a number"
        raise Refused(f"{key} {said} in {where}: the scale of the update is not known")
    return float(value)


def peft_config(place: Place, asked: Asked) -> dict[str, Any]:
    """The configuration of a LoRA of PEFT that lies in the folder, with the base that the user names if it has none.

    Raises Refused where there is none, or for another type than LoRA.
    """
    if not place.has_config:
        raise Refused(f"no {CONFIG_NAME} beside it: the scale of the update is not known")
    if place.peft_type != "LORA":
        raise Refused(f"peft_type is {shortened(place.peft_type or 'missing')}, not LORA")
    base = text(place.config, "base_model_name_or_path") or asked.base
    return {**place.config, **({"base_model_name_or_path": base} if base else {})}


def unpickled(name: str, into: str) -> str:
    """The remedy for a pickle: a line that makes safetensors of it, by a loader that runs no code in it."""
    made = f"save({{k: v.contiguous() for k, v in load({name!r}, weights_only=True).items()}}, {into!r})"
    return f'python -c "from torch import load; from safetensors.torch import save_file as save; {made}"'


def text(config: Mapping[str, Any], key: str) -> str:
    """A text of a configuration, "" where there is none."""
    value = config.get(key)
    return value if isinstance(value, str) else ""


def others_in_words(names: Iterable[str]) -> str:
    """Tensors that are no factors, for a refusal: the first and how many more."""
    first, *rest = names
    return shortened(first) + (f" and {counted(len(rest), 'other')}" if rest else "")
