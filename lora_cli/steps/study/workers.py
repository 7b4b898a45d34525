"""The folder and the worker of a study, or of a sequence, at a path."""

from pathlib import Path

from lora_cli.steps.study.folder import StudyFolder, WorkFolder
from lora_cli.steps.study.sequence.folder import PLAN_FILE, SequenceFolder
from lora_cli.steps.study.sequence.work import SequenceWorker
from lora_cli.steps.study.work import Worker


def folder_in(path: Path) -> WorkFolder:
    """The folder at `path`, of a study where it holds no sequence."""
    return SequenceFolder(path) if _is_sequence(path) else StudyFolder(path)


def worker_in(path: Path) -> Worker | SequenceWorker:
    """The worker for the cells in the folder `path`. DataError where it holds neither a study nor a sequence."""
    return SequenceWorker(path) if _is_sequence(path) else Worker(path)


def _is_sequence(path: Path) -> bool:
    return (path / PLAN_FILE).exists()
