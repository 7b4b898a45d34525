"""The data of a sequence, copied into its folder: per task what is learnt and what is tested, as files of their own."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lora_cli.errors import DataError, UsageError
from lora_cli.files import read_given
from lora_cli.outputs import whole_file
from lora_cli.records import Example
from lora_cli.task import Task, read_task, split

DATA_FOLDER = "data"
_NAME = re.compile(r"[A-Za-z0-9][\w.+-]{0,63}", re.ASCII)
_FEWEST = 2
"""Examples that a training needs: one to learn, one to choose the best step by."""


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """The data of one task of a sequence: the lines of two task files in which every example has its id."""

    name: str
    train: bytes
    test: bytes

    @cached_property
    def sha256(self) -> tuple[str, str]:
        """The SHA-256 of both."""
        return hashlib.sha256(self.train).hexdigest(), hashlib.sha256(self.test).hexdigest()

    def write(self, folder: Path) -> None:
        """Write both files below the sequence's folder, unless they are there."""
        for part, data in (("train", self.train), ("test", self.test)):
            place = data_file(folder, self.name, part)
            if not place.exists() or read_given(place) != data:
                with whole_file(place) as file:
                    file.write(data)


def data_file(folder: Path, name: str, part: str) -> Path:
    """The file of one part, "train" or "test", of a task's data in a sequence's folder."""
    return folder / DATA_FOLDER / f"{name}.{part}.jsonl"


def halves(name: str, task: Task, held_out: float) -> TaskData:
    """A task's examples, of which the share `held_out`, drawn by a hash of their ids, is kept for testing.

    Raises DataError for a task too small for that.
    """
    if not 0 < held_out < 1:
        raise UsageError(f"--held-out is a share between 0 and 1, not {held_out}")
    if len(task.examples) <= _FEWEST:
        raise DataError(
            f"{task.file}: {len(task.examples)} examples cannot be split into those to learn and those to test",
            hint="give at least three, or test data of its own",
        )
    learnt, tested = split(task.examples, fraction=held_out)
    if len(learnt) < _FEWEST:
        raise DataError(
            f"{task.file}: {len(task.examples)} examples leave one to learn from, if {held_out:g} of them are kept for "
            "testing",
            hint="keep a smaller share: --held-out 0.2",
        )
    lines = _lines(task)
    return TaskData(name=name, train=_joined(lines, learnt), test=_joined(lines, tested))


def given(name: str, task: Task, test: Task) -> TaskData:
    """A task with test data of its own. DataError for a task of one example."""
    if len(task.examples) < _FEWEST:
        raise DataError(f"{task.file}: one example is not enough to learn from", hint="give at least two examples")
    return TaskData(name=name, train=_joined(_lines(task), task.examples), test=_joined(_lines(test), test.examples))


def read_data(folder: Path, name: str, part: str, sha256: str) -> Task:
    """One part of a task's data. DataError if it is not the data of the plan."""
    task = read_task(data_file(folder, name, part))
    if task.sha256 != sha256:
        raise DataError(f"{task.file} has changed since the sequence was planned", hint="plan it anew with lora study")
    return task


def names_of(files: Sequence[Path]) -> list[str]:
    """A name for each task file: its own, or that of its folder too where two files are called alike.

    Raises UsageError for a file that is given twice, for names that are alike all the same, or that hold more than
    letters, digits and . _ + -.
    """
    for file in files:
        if files.count(file) > 1:
            raise UsageError(f"--sequence has {file} twice", hint="each task of a sequence comes once")
    names = [file.stem for file in files]
    if len({*names}) < len(names):
        names = [f"{file.absolute().parent.name}-{file.stem}" for file in files]
    if len({*names}) < len(names):
        raise UsageError(f"two tasks are called {max(names, key=names.count)!r}", hint="rename one of the files")
    for name in names:
        if _NAME.fullmatch(name) is None:
            raise UsageError(
                f"task {name!r}: a name has letters, digits and . _ + - alone, and at most 64 of them",
                hint="rename the file",
            )
    return names


def _lines(task: Task) -> dict[str, str]:
    """The lines of a task file by their examples' ids, which stand in them."""
    data = read_given(task.file)
    if hashlib.sha256(data).hexdigest() != task.sha256:
        raise DataError(f"{task.file} has changed while it was read", hint="run again")
    lines = data.decode("utf-8-sig").split("\n")
    return {
        example.id: json.dumps({**json.loads(line), "id": example.id})
        for example, line in zip(task.examples, lines, strict=False)
    }


def _joined(lines: dict[str, str], examples: Sequence[Example]) -> bytes:
    return "".join(f"{lines[example.id]}\n" for example in examples).encode()
