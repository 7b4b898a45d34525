"""Run work once and record it: key, claim, run, output, and the reuse of an existing result."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

from lora_cli.catalogue import runs
from lora_cli.formats.run_record import Run, claim, key_of
from lora_cli.records import Progress, silent

Report = TypeVar("Report")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A piece of work: its verb, the settings and inputs that decide its result, and the place of the result.

    `inputs` maps `id@commit` (or a file's name) to the SHA-256 of its bytes. The result goes to `out`; if `out` is
    None, to `verb-KEY` (or `name-KEY`, if there is a name) below `runs`.
    """

    verb: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]
    runs: Path
    out: Path | None = None
    name: str = ""
    device: str = "cpu"

    @cached_property
    def key(self) -> str:
        """Equal keys mean equal work."""
        return key_of(self.verb, self.settings, self.inputs)

    @property
    def folder(self) -> Path:
        """The folder of the result."""
        return self.out or self.runs / f"{self.name or self.verb}-{self.key[:8]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished(Generic[Report]):
    """A finished job: its run, and the report of the work; None if the result existed already."""

    run: Run
    report: Report | None


def run_once(
    db: Path,
    job: Job,
    work: Callable[[Run], Report],
    *,
    force: bool,
    replace: bool = False,
    progress: Progress = silent,
) -> Finished[Report]:
    """Do `job` by `work`, unless its result exists, and record the run in `db` however it ends.

    Args:
        work: writes the whole folder of the job or nothing.
        force: redo work that is done, and replace what the folder holds.
        replace: replace another result in the folder, but do not redo work that is done.

    Raises:
        OutputError: the folder holds something else, or a result that was changed since.
    """
    done = claim(job.folder, job.key, force=force, replace=replace, progress=progress)
    with runs.recorded(db, job.verb, job.settings, job.inputs, job.folder) as run:
        run.device = job.device
        if done:
            run.take(job.folder)
            return Finished(run=run, report=None)
        return Finished(run=run, report=work(run))
