"""Programs that adapters are exported for, or that serve a merge. One file is one program: an object of its name.

`Export` is a program with the files that it reads. `Server` is one that reads folders of PEFT; docs/merging.md lists
the rules of servers, docs/exchange.md those of all programs, and tests/readers.py holds each as a function.
"""

import json
import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_cli.errors import Refused
from lora_cli.formats.base_names import split_revision
from lora_cli.methods import file_names, member
from lora_cli.names import leaves
from lora_cli.precision import BITS, FLOATS, STORED
from lora_cli.records import Progress

if TYPE_CHECKING:
    from lora_cli.formats.numbers import StoredTensor
    from lora_cli.formats.reader import Factors, OpenAdapter
    from lora_cli.formats.skeleton import Skeleton

Shape = tuple[int, int]

# Linear layers of decoder models of the Llama kind, separate and as servers fuse them.
_LLAMA_MODULES = frozenset(
    ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj")
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """An opened adapter to export, and its base.

    `base` is the base's name in results. `config` is its config.json, {} where it is not on this machine; `skeleton`
    its modules, None where its class is not known. `meant` are all modules of the base whose last parts are those of
    the adapter's modules, None where the base is not known well enough. `called` is the base as the program calls it.
    """

    adapter: "OpenAdapter"
    base: str
    config: Mapping[str, Any] = field(default_factory=dict)
    skeleton: "Skeleton | None" = None
    meant: Collection[str] | None = None
    called: str = ""

    @property
    def id(self) -> str:
        """The adapter's id."""
        return self.adapter.ref.id

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """Its modules in natural order."""
        from lora_cli.formats.reader import natural

        return tuple(natural(self.adapter.modules))

    @cached_property
    def ranks(self) -> Mapping[str, int]:
        """The rank of each module."""
        return {module: self.adapter.modules[module].rank for module in self.modules}

    @property
    def rank(self) -> int:
        """The highest rank."""
        return max(self.ranks.values())

    @property
    def scale(self) -> float | None:
        """The scale of all modules; None where they differ, or where it is 0."""
        scales = set(self.adapter.scales.values())
        return (scales.pop() or None) if len(scales) == 1 else None

    @cached_property
    def precision(self) -> str:
        """The narrowest precision that holds every factor, as safetensors names it; fp32 for factors in fp8."""
        found = {one if one in FLOATS else "F32" for one in self.adapter.dtypes}
        if len(found) == 1:
            return found.pop()
        return "F64" if "F64" in found else "F32"

    def demand_linear(self, program: str) -> None:
        """Refused for an embedding, a convolution or a matrix of an expert: `program` holds linear layers only."""
        for module in self.modules:
            factors = self.adapter.modules[module]
            matrix = None if self.skeleton is None else self.skeleton.get(module)
            if factors.kind == "embedding":
                raise self._cannot(program, module, "an embedding")
            if factors.kernel:
                raise self._cannot(program, module, "a convolution")
            stacked = len(factors.parts) > 1 or factors.parts[0].experts > 1
            if stacked or ".experts." in module or (matrix is not None and matrix.expert is not None):
                raise self._cannot(program, module, "a part of a layer of experts")

    def _cannot(self, program: str, module: str, what: str) -> Refused:
        return Refused(
            f"{self.id}: {module} is {what}, which {program} cannot hold",
            hint="leave such modules out (lora merge --scope modules=…), or add the adapter to its base (lora bake)",
        )


class Written(NamedTuple):
    """A module as a program reads it from the written files: the numbers of its factors, and its scale."""

    factors: "Factors"
    scale: float


Reader = Callable[[str], Written]
"""Reads a module of written files by its name in the adapter."""


class Plan(ABC):
    """The files of an export, decided before a weight is read.

    `folds` is the factor on B of each module; a module whose factor is 1 keeps its numbers. `dtype` is the precision
    on disk, as safetensors names it.
    """

    source: Source
    folds: Mapping[str, float]
    dtype: str
    notes: tuple[str, ...] = ()

    @property
    @abstractmethod
    def files(self) -> Mapping[str, int]:
        """The files by name, with their sizes in bytes: to a few kilobytes for text and headers."""

    @abstractmethod
    def write(self, folder: Path, progress: Progress) -> None:
        """Write the files into an existing folder, a module at a time. Refused for NaN, Inf and overflows."""

    @abstractmethod
    def opened(self, folder: Path) -> AbstractContextManager[Reader]:
        """A reader of the written files, by the program's own rule."""

    def stored(self, module: str) -> "tuple[StoredTensor, StoredTensor]":
        """B and A of a module as they are written. Refused where they do not fit the precision."""
        from lora_cli.formats.numbers import rounded

        fold = self.folds[module]
        b, a = self.source.adapter.numbers(module)
        found = rounded(b.astype("f8") * fold if fold != 1 else b, self.dtype), rounded(a, self.dtype)
        if not all(one.finite for one in found):
            raise Refused(f"{module}: values overflow the precision on disk", hint="choose a wider --dtype")
        return found

    def each(self, progress: Progress) -> "Iterator[tuple[str, StoredTensor, StoredTensor]]":
        """Every module with its `stored` B and A, with progress."""
        total = len(self.source.modules)
        for done, module in enumerate(self.source.modules):
            progress("export", done, total)
            yield module, *self.stored(module)
        progress("export", total, total)

    def bytes_of(self, numbers: int) -> int:
        """The bytes of some numbers on disk."""
        return numbers * BITS[self.dtype] // 8

    @property
    def numbers(self) -> int:
        """The numbers in all factors."""
        shapes = map(self.source.adapter.shape, self.source.modules)
        return sum(
            rank * (rows + columns) for rank, (rows, columns) in zip(self.source.ranks.values(), shapes, strict=True)
        )


def precision_of(source: Source, folds: Mapping[str, float], dtype: str) -> str:
    """The precision on disk: the user's choice; else the adapter's where no number changes, else fp32."""
    if dtype != "auto":
        return STORED[dtype]
    return source.precision if all(fold == 1 for fold in folds.values()) else "F32"


def folds_of(source: Source, outside: float) -> dict[str, float]:
    """The factor on B of each module if a program multiplies every B·A by `outside`."""
    scales = source.adapter.scales
    return {module: 1.0 if scales[module] == outside else scales[module] / outside for module in source.modules}


class Export(ABC):
    """A program that loads adapters: its name, the version of its rules, and the files that it reads."""

    program: str
    version: str

    @property
    def title(self) -> str:
        """The program with its version."""
        return f"{self.program} {self.version}"

    def sure(self, adapter: "OpenAdapter", config: Mapping[str, Any]) -> bool:
        """Whether the program's own tables show that the adapter's modules are those of the base, by its config.json.

        The base's class is built only where they do not, which takes seconds.
        """
        return False

    @abstractmethod
    def plan(self, source: Source, dtype: str) -> Plan:
        """The files of an export.

        Args:
            dtype: a `Precision`.

        Raises:
            Refused: the program cannot hold the adapter; what it cannot hold, by name.
        """


class Server(Export):
    """A program that serves PEFT folders: its rules, and the command that starts it.

    `highest_rank` is the highest rank that it loads, None for any. `one_rank` is true if it reads neither rank_pattern
    nor alpha_pattern and does not apply every module at its own rank.
    """

    highest_rank: int | None = None
    one_rank: bool = False

    def plan(self, source: Source, dtype: str) -> Plan:
        from lora_cli.exports._folder import FolderPlan

        self.demand_servable(conv1d=[source.id] if source.adapter.fan_in_fan_out else [], rank=source.rank)
        shapes = {module: source.adapter.shape(module) for module in source.modules}
        known = shapes if source.skeleton is None else {**source.skeleton.layers, **shapes}
        zeros = self.zeros(source.modules, known)
        unsure = self.not_surely_served(source.modules)
        notes = [f"{self.program} may have no LoRA layer for {', '.join(unsure)}"] if unsure else []
        return FolderPlan.of(source, dtype, zeros=zeros, notes=tuple(notes))

    def demand_servable(self, *, conv1d: Sequence[str], rank: int) -> None:
        """Refused for modules without a LoRA layer in the program, and for a rank above its limit.

        Args:
            conv1d: the adapters whose modules are Conv1D.
        """
        if conv1d:
            raise Refused(f"{self.title} takes no LoRA on Conv1D modules, as {conv1d[0]} has (fan_in_fan_out)")
        if self.highest_rank is not None and rank > self.highest_rank:
            raise Refused(
                f"{self.program} serves ranks up to {self.highest_rank}, but this result has rank {rank}",
                hint="give a lower --rank",
            )

    def zeros(self, modules: Collection[str], shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """The modules that must be added as zeros so that all of `modules` load, with their shapes (out, in).

        Args:
            shapes: the shape of every known module.

        Raises Refused if the shape of a module to add is not known.
        """
        return {}

    def misread(self, modules: Collection[str], known: Collection[str]) -> str:
        """How the program reads a result with these modules otherwise than PEFT does, "" if it does not.

        Args:
            known: all modules of the parents. Modules that they lack too were not lost in the merge.
        """
        return ""

    def not_surely_served(self, modules: Iterable[str]) -> list[str]:
        """The kinds of modules that the program may have no LoRA layer for."""
        return sorted(leaves(modules) - _LLAMA_MODULES)

    def serve_line(self, base: str, folder: Path, rank: int) -> str:
        """The shell line that serves the adapter on `base`, a Hub id or a folder; quoted, whatever their names hold.

        An id may carry its revision: `owner/name@revision`.
        """
        model, revision = split_revision(base)
        return shlex.join(self.command([model, *(["--revision", revision] if revision else [])], folder, rank))

    @abstractmethod
    def command(self, base: Sequence[str], folder: Path, rank: int) -> list[str]:
        """The words of the shell line; `base` are those for the base model, its revision among them."""


def named_path(folder: Path, name_key: str, path_key: str) -> str:
    """An adapter's NAME=PATH; JSON with these keys if a server would split it at another place.

    Both servers split at an equals sign, vLLM also at commas.
    """
    name, path = folder.name, str(folder.absolute())
    plain = f"{name}={path}"
    if plain.count("=") == 1 and "," not in plain and not name.startswith(("-", "{")):
        return plain
    return json.dumps({name_key: name, path_key: path})


def export(name: str) -> Export:
    """The program called `name`, as its file is."""
    found: Export = member(__name__, name)
    return found


def server(name: str) -> Server:
    """The server called `name`, as its file is."""
    found: Server = member(__name__, name)
    return found


def servers() -> list[Server]:
    """Every server of the folder."""
    return [server(name) for name in file_names(__name__, "Server")]
