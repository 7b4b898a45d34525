"""Places where the cells of a study are done, for `lora study --executor NAME`. One file is one of them.

A file holds a function of its name, `Executor`. It does the cells that have no result yet in the folder of the study,
each by a worker of `steps.study.workers`, and yields the outcome of each as it ends.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

from lora_cli.methods import file_names, member
from lora_cli.records import Progress
from lora_cli.steps.study.folder import Piece, WorkFolder
from lora_cli.steps.study.work import Outcome

PACKAGE = "lora_cli.executors"


class Executor(Protocol):
    """Does the cells of a study or of a sequence.

    jobs: how many at once, None for as many as the place has room for.
    """

    def __call__(
        self, folder: WorkFolder, cells: Sequence[Piece], *, jobs: int | None, progress: Progress
    ) -> Iterator[Outcome]: ...


def executor(name: str) -> Executor:
    """The executor called `name`, imported."""
    found: Executor = member(PACKAGE, name)
    return found


NAMES = file_names(PACKAGE)
