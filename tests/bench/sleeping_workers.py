"""In place of steps/study/workers.py for bench_executors: workers that load nothing, and whose cells sleep."""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from lora_cli.steps.study.folder import Outcome, Piece, StudyFolder
from lora_cli.steps.study.plan import Need

SECONDS = 5.0


class SleepingFolder(StudyFolder):
    """A folder of a study in which nothing is done."""

    @property
    def device(self) -> str:
        """The CPU."""
        return "cpu"

    def open_needs(self, cells: Iterable[Piece]) -> list[Need]:
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
