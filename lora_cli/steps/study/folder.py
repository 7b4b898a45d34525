"""The folder of a study: where its plan, its data, its cells and their shared work are."""

import hashlib
import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Protocol

import msgspec

from lora_cli.errors import DataError, OutputError
from lora_cli.files import read_given, read_regular, unreadable
from lora_cli.outputs import hold, whole_file, writing
from lora_cli.records import Adapter
from lora_cli.steps.study.plan import Cell, Need, Study, read_study, shard_of, study_text

STUDY_FILE, TABLE_FILE = "study.json", "table.jsonl"
RESULT_FILE, COST_FILE, FAILED_FILE, ROWS_FILE = "result.json", "cost.json", "failed.json", "rows.jsonl"
DATA_FILE, TEST_FILE, CANDIDATES_FILE = "train.jsonl", "test.jsonl", "adapters.jsonl"
ADAPTER_FOLDER = "adapter"
_PATIENCE = 0.05


class Piece(Protocol):
    """Some work by its name, and the work that has to be done before it."""

    @property
    def name(self) -> str: ...
    @property
    def needs(self) -> tuple[str, ...]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a cell or a need: the reason if it failed, else its seconds; 0 if it was there."""

    name: str
    seconds: float = 0.0
    error: str = ""
    hint: str = ""


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """Why a cell could not be done."""

    cell: str
    error: str
    hint: str = ""


class Answer(msgspec.Struct):
    """An answer in a result, as far as tables read it."""

    id: str
    value: float


class _Result(msgspec.Struct):
    """A result, as far as tables read it."""

    schema: str
    cell: str
    value: float
    n: int
    answers: Annotated[list[Answer], msgspec.Meta(min_length=1)]


class _Selection(msgspec.Struct):
    """The file of a selection."""

    adapters: list[str]


@dataclass(frozen=True)
class WorkFolder(ABC):
    """A folder in which cells are done by workers: a study's, or that of a sequence."""

    path: Path

    @property
    @abstractmethod
    def device(self) -> str:
        """The device on which its workers compute."""

    @abstractmethod
    def planned(self) -> Sequence[Piece]:
        """Every cell of the plan."""

    @abstractmethod
    def open_needs(self, cells: Iterable[Piece]) -> Sequence[Piece]:
        """The work that these cells need, beside cells, and that is not done."""

    @abstractmethod
    def shard(self, part: tuple[int, int]) -> Sequence[Piece]:
        """The cells of shard i of n, (i, n); all shards together have every cell of the plan."""

    @abstractmethod
    def most_shards(self, cells: Sequence[Piece]) -> int:
        """Into so many shards these cells can be divided."""

    @cached_property
    def cells(self) -> Path:
        """The folder of the cells."""
        return self.path / "cells"

    def cell(self, name: str) -> Path:
        """The folder of a cell."""
        return self.cells / name

    def has(self, name: str) -> bool:
        """Whether a cell has a result."""
        return os.path.isfile(f"{self.cells}/{name}/{RESULT_FILE}")  # noqa: PTH113 - ten times as fast, for 100,000 cells

    def done(self, cells: Iterable[Piece]) -> set[str]:
        """The names of the cells that have a result."""
        return {cell.name for cell in cells if self.has(cell.name)}

    def result_bytes(self, name: str) -> bytes:
        """The bytes of a cell's result. FileNotFoundError where there is none, DataError if it cannot be read."""
        file = f"{self.cells}/{name}/{RESULT_FILE}"
        try:
            return read_regular(file)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise unreadable(Path(file), error) from None

    def failure(self, name: str) -> Failure | None:
        """Why a cell could not be done, None if it was not tried or is done."""
        try:
            return msgspec.json.decode(read_regular(self.cell(name) / FAILED_FILE), type=Failure)
        except (OSError, msgspec.DecodeError):
            return None

    def note_failure(self, name: str, error: str, hint: str) -> None:
        """Keep why a cell could not be done, until it is."""
        write_json(self.cell(name) / FAILED_FILE, {"cell": name, "error": error, "hint": hint})


@dataclass(frozen=True)
class StudyFolder(WorkFolder):
    """A study's folder, which holds all that its cells need but the weights of base and adapters."""

    @cached_property
    def study(self) -> Study:
        """The plan. DataError if there is none, or another file in its place."""
        file = self.path / STUDY_FILE
        try:
            return read_study(read_given(file), str(file))
        except OSError as error:
            raise DataError(f"{self.path}: no folder of a study ({error.strerror})") from None

    @property
    def device(self) -> str:
        """The device on which its workers compute."""
        return self.study.base.device

    @property
    def data(self) -> Path:
        """The examples that adapters are chosen, fitted and trained on."""
        return self.path / DATA_FILE

    @property
    def test(self) -> Path:
        """The examples that cells are scored on."""
        return self.path / TEST_FILE

    @cached_property
    def shared(self) -> Path:
        """The folder of the work that cells share."""
        return self.path / "shared"

    def planned(self) -> list[Cell]:
        """Every cell of the plan."""
        return self.study.cells()

    def shard(self, part: tuple[int, int]) -> list[Cell]:
        """Every n-th cell."""
        return shard_of(self.planned(), part)

    def most_shards(self, cells: Sequence[Piece]) -> int:
        """One per cell."""
        return len(cells)

    def cost(self, name: str) -> Path:
        """The file about what a need took."""
        return self.shared / f"{name}.{COST_FILE}"

    def selection(self, name: str) -> Path:
        """The file of a pool's adapters."""
        return self.shared / f"{name}.json"

    def target(self, name: str) -> Path:
        """The folder of a LoRA trained on the data."""
        return self.shared / name

    def is_made(self, name: str) -> bool:
        """Whether a need is there: outputs are whole or absent."""
        return self.selection(name).is_file() or self.target(name).is_dir()

    def open_needs(self, cells: Iterable[Piece]) -> list[Need]:
        """The shared work that these cells need and that is not done."""
        names = {cell.name for cell in cells}
        needs = self.study.needs(cell for cell in self.study.cells() if cell.name in names)
        return [need for need in needs.values() if not self.is_made(need.name)]

    def result(self, name: str) -> dict[str, Any]:
        """The result of a cell. DataError if it is no result of this cell."""
        return parsed_result(self.result_bytes(name), self, name)

    def chosen(self, name: str) -> list[str]:
        """The adapters of a selection, as `id@commit`, the best first. DataError for others than the candidates."""
        file = self.selection(name)
        try:
            found = msgspec.json.decode(read_regular(file), type=_Selection).adapters
        except OSError as error:
            raise unreadable(file, error) from None
        except (msgspec.DecodeError, RecursionError):
            found = []
        if not found or not self._pinned.issuperset(found):
            raise DataError(f"{file}: no selection of this study's candidates", hint="remove it and run again")
        return found

    def candidates(self) -> Iterator[Adapter]:
        """The adapters that pools are chosen from, with all their facts. DataError for a damaged file."""
        file = self.path / CANDIDATES_FILE
        try:
            for line in read_regular(file).splitlines():
                yield msgspec.json.decode(line, type=Adapter)
        except OSError as error:
            raise unreadable(file, error) from None
        except (msgspec.DecodeError, RecursionError):
            raise DataError(f"{file}: a line is no adapter") from None

    @cached_property
    def _pinned(self) -> frozenset[str]:
        """The candidates, as `id@commit`."""
        return frozenset(one.ref.pinned for one in self.candidates())

    def demand_unchanged(self) -> None:
        """DataError if data, test data or candidates are others than those that the study was planned for."""
        shared = self.study.shared
        pinned = "\n".join(one.ref.pinned for one in self.candidates())
        found = {
            DATA_FILE: (_sha256(self.data), shared["data"]),
            TEST_FILE: (_sha256(self.test), shared["test"]),
            CANDIDATES_FILE: (hashlib.sha256(pinned.encode()).hexdigest(), shared["candidates"]),
        }
        for name, (ours, planned) in found.items():
            if ours != planned:
                raise DataError(
                    f"{self.path / name} has changed since the study was planned", hint="choose another folder with -o"
                )

    def scratch(self, name: str) -> Path:
        """The folder of unfinished work on a need; nobody but its holder touches it."""
        return self.shared / f".{name}"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make `folder` and hold it while the block runs; wait while another process holds it.

    A folder that is made for a block that fails, and in which nothing is, is removed.

    Raises OutputError where it cannot be made, or is a link.
    """
    descriptor, is_new = _made_and_held(folder)
    try:
        yield
    except BaseException:
        if is_new:
            with suppress(OSError):
                folder.rmdir()
        raise
    finally:
        os.close(descriptor)


def _made_and_held(folder: Path) -> tuple[int, bool]:
    """The open descriptor of a folder that this process holds, and whether it was made here.

    Who held it before may have removed it: then it is made again.
    """
    while True:
        with writing(folder):
            is_new = not folder.exists()
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        while not hold(descriptor, without_locks=True):
            time.sleep(_PATIENCE)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), folder.stat()):
                return descriptor, is_new
        os.close(descriptor)


def parsed_result(data: bytes, folder: StudyFolder, name: str) -> dict[str, Any]:
    """The result of the cell `name` in the bytes of its file. DataError for anything else."""
    try:
        result = msgspec.json.decode(data, type=_Result)
        if result.schema == "lora.study.cell/1" and result.cell == name:
            found: dict[str, Any] = msgspec.json.decode(data)
            return found
    except (msgspec.DecodeError, RecursionError):
        pass
    file = folder.cell(name) / RESULT_FILE
    raise DataError(f"{file}: not the result of this cell", hint="remove its folder and run the study again")


def write_json(file: Path, value: Any) -> None:
    """Write a value as JSON, whole or not at all, in the same bytes whatever the order of its keys was."""
    with whole_file(file) as opened:
        opened.write(json.dumps(value, sort_keys=True, ensure_ascii=False).encode() + b"\n")


def write_plan(folder: StudyFolder, study: Study, adapters: Sequence[Adapter], data: bytes, test: bytes) -> None:
    """Write a new study's folder; study.json comes last, so that a folder that has it has all."""
    lines = b"".join(msgspec.json.encode(one, order="sorted") + b"\n" for one in adapters)
    for name, text in ((CANDIDATES_FILE, lines), (DATA_FILE, data), (TEST_FILE, test), (STUDY_FILE, study_text(study))):
        with whole_file(folder.path / name) as file:
            file.write(text)


def demand_free(
    path: Path, *, beside: Collection[str] = (CANDIDATES_FILE, DATA_FILE, TEST_FILE), what: str = "study"
) -> None:
    """OutputError for a folder that holds anything but the beginning of a study, `beside` which its plan comes last."""
    if path.is_symlink():
        raise OutputError(f"{path}: a link; outputs are never written through links")
    try:
        found = {entry.name for entry in path.iterdir() if not entry.name.startswith(".")}
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(f"{path}: cannot be read ({error.strerror})", hint="choose another folder with -o") from None
    if found - {*beside}:
        raise OutputError(f"{path} exists, and is no {what}", hint="choose another folder with -o")


def _sha256(file: Path) -> str:
    try:
        return hashlib.sha256(read_regular(file)).hexdigest()
    except OSError as error:
        raise unreadable(file, error) from None
