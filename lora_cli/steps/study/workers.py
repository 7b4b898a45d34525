"""The folder and the worker of a study, or of a sequence, at a path."""

from pathlib import Path
from typing import TYPE_CHECKING

from lora_cli.steps.study.folder import StudyFolder
from lora_cli.steps.study.sequence.folder import PLAN_FILE, SequenceFolder

if TYPE_CHECKING:
    from lora_cli.steps.study.sequence.work import SequenceWorker
    from lora_cli.steps.study.work import Worker


def folder_in(path: Path) -> StudyFolder | SequenceFolder:
    """The folder at `path`, of a study where it holds no sequence."""
    return SequenceFolder(path) if is_sequence(path) else StudyFolder(path)


def worker_in(path: Path) -> "Worker | SequenceWorker":
    """The worker for the cells in the folder `path`. DataError where it holds neither a study nor a sequence.

    What it computes with is imported here: who only reads a folder does not wait for it.
    """
    if is_sequence(path):
        from lora_cli.steps.study.sequence.work import SequenceWorker

        return SequenceWorker(path)
    from lora_cli.steps.study.work import Worker

    return Worker(path)


def is_sequence(path: Path) -> bool:
    """Whether the folder at `path` is that of a sequence."""
    return (path / PLAN_FILE).exists()
