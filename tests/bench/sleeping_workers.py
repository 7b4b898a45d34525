"""In place of steps/study/workers.py for bench_executors: workers that load nothing, and whose cells sleep."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from lora_cli.steps.study.folder import Piece
from lora_cli.steps.study.worker import Outcome

SECONDS = 5.0


@dataclass(frozen=True)
class SleepingFolder:
    """A folder in which nothing is done."""

    path: Path
    device: str = "cpu"

    def cell(self, name: str) -> Path:
        """The folder of a cell, which nobody makes."""
        return self.path / name

    def done(self, cells: Iterable[Piece]) -> set[str]:
        """None."""
        return set()

    def open_needs(self, cells: Iterable[Piece]) -> Sequence[Piece]:
        """None."""
        return []


class SleepingWorker:
    """A worker whose cells take `SECONDS` and no core."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        pass

    def load(self) -> None:
        """Load nothing."""

    def run(self, name: str) -> Outcome:
        """Sleep."""
        time.sleep(SECONDS)
        return Outcome(name=name, seconds=SECONDS)


def folder_in(path: Path) -> SleepingFolder:
    """The folder."""
    return SleepingFolder(path)


def worker_in(path: Path) -> SleepingWorker:
    """The worker."""
    return SleepingWorker()
