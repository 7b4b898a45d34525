"""Places where the cells of a study are done, for `lora study --executor NAME`. One file is one of them.

A file holds a function of its name, `Executor`. It does the cells that have no result yet in the folder of the study,
each by a worker of `steps.study.workers`, and yields the outcome of each as it ends; or it writes a script that does
them elsewhere. Further parameters are its own options.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lora_cli.errors import UsageError
from lora_cli.methods import file_names, member
from lora_cli.records import Progress
from lora_cli.steps.study.folder import Outcome, Piece, WorkFolder

PACKAGE = "lora_cli.executors"
NAMES = file_names(PACKAGE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """A script that does cells elsewhere, in so many parts, and the command that starts it."""

    file: Path
    parts: int
    submit: str


class Executor(Protocol):
    """Does the cells of a study or of a sequence, or writes a script that does.

    jobs: how many at once, None for as many as the place has room for.
    """

    def __call__(
        self,
        folder: WorkFolder,
        cells: Sequence[Piece],
        *,
        jobs: int | None,
        progress: Progress,
        warn: Callable[[str], None],
    ) -> Iterator[Outcome] | Script: ...


def executor(name: str, **options: object) -> Executor:
    """The executor called `name`, imported, with these options of its own; None stands for one that is not given.

    A file may have a function `demand` beside it, which gets these options and refuses what can never work.

    Raises:
        UsageError: it has no such option, or `demand` refuses one.
    """
    found: Callable[..., Iterator[Outcome] | Script] = member(PACKAGE, name)
    takes = inspect.signature(found).parameters
    given = {option: value for option, value in options.items() if value is not None}
    for option in given.keys() - takes.keys():
        others = " or ".join(other for other in NAMES if option in inspect.signature(member(PACKAGE, other)).parameters)
        raise UsageError(
            f"--executor {name} takes no --{option.replace('_', '-')}", hint=f"it is an option of --executor {others}"
        )
    if demand := getattr(sys.modules[found.__module__], "demand", None):
        demand(**given)
    return functools.partial(found, **given)
