"""What adapters in folders learnt from, as their records tell, and which examples are evaluated that they learnt."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from lora_cli.errors import DataError
from lora_cli.formats.run_record import RECORD_FILE, read_record
from lora_cli.records import AdapterRef, Example
from lora_cli.steps.evaluate.answers import unchanged
from lora_cli.steps.task_view import repeated
from lora_cli.task import VALID, Task, split


class Learnt(NamedTuple):
    """The data of a fit or a training: the file's name and SHA-256, and the seed of its split.

    `valid` is the name and SHA-256 of the validation file, ("", "") if a part of the data was held out.
    """

    name: str
    sha256: str
    seed: int
    valid: tuple[str, str] = ("", "")

    def training(self, files: Sequence[Path | None]) -> list[Example] | None:
        """The training part. None if neither `files` nor the working folder hold the data."""
        task = unchanged(self.name, self.sha256, files)
        if task is None or self.valid[0]:
            return None if task is None else task.examples
        return split(task.examples, seed=self.seed)[0]

    def validation(self, files: Sequence[Path | None]) -> Task | None:
        """The task of the validation part alone; None as for `training`."""
        if self.valid[0]:
            return unchanged(*self.valid, files)
        task = unchanged(self.name, self.sha256, files)
        return None if task is None else replace(task, examples=split(task.examples, seed=self.seed)[1])


def learnt(folder: Path) -> Learnt:
    """The data of the fit or training that wrote `folder`. DataError if its record does not name it."""
    record = read_record(folder)
    try:
        if record["command"] in ("fit", "train"):
            settings, inputs = record["settings"], record["inputs"]
            name, valid, own = str(settings["data"]), str(settings.get("valid", "")), ("", "")
            # A record may be a stranger's: a name is one of a file, never a way to it.
            if valid:
                own = Path(valid).name, str(inputs[f"{VALID}{valid}"])
            return Learnt(Path(name).name, str(inputs[name]), int(settings["seed"]), own)
    except (KeyError, TypeError, ValueError):
        pass
    raise DataError(f"{folder / RECORD_FILE} names no data that was learnt")


class Trained(NamedTuple):
    """The examples of a task with a prompt on which an adapter was trained; None if its data, `name`, is gone."""

    name: str
    examples: int | None


def trained_on(adapters: Sequence[AdapterRef], task: Task, files: Sequence[Path | None]) -> list[Trained | None]:
    """What each adapter learnt of a task; None for one that is no fit or training of this tool.

    Args:
        files: the places where training data may be, besides the folder of the task.
    """
    shared: dict[Learnt, int | None] = {}
    found: list[Trained | None] = []
    for adapter in adapters:
        data = _learnt_by(adapter)
        if data is not None and data not in shared:
            training = data.training([*files, task.file, task.file.parent / data.name])
            shared[data] = None if training is None else repeated(training, task.examples)
        found.append(None if data is None else Trained(data.name, shared[data]))
    return found


def _learnt_by(adapter: AdapterRef) -> Learnt | None:
    """The data of an adapter in a folder that a fit or a training wrote, else None."""
    if adapter.source != "folder":
        return None
    try:
        return learnt(Path(adapter.repo, adapter.subfolder))
    except DataError:
        return None
