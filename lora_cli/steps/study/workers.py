"""The worker for a folder: that of a study, or of a sequence."""

from pathlib import Path

from lora_cli.steps.study.sequence.folder import PLAN_FILE
from lora_cli.steps.study.sequence.work import SequenceWorker
from lora_cli.steps.study.work import Worker


def worker_in(path: Path) -> Worker | SequenceWorker:
    """The worker for the cells in the folder `path`. DataError where it holds neither a study nor a sequence."""
    return SequenceWorker(path) if (path / PLAN_FILE).exists() else Worker(path)
