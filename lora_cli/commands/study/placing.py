"""Where a study's cells are done: the options of that, and the cells done there."""

import shlex
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from lora_cli.errors import UsageError
from lora_cli.methods import file_names
from lora_cli.options import Flag, Options
from lora_cli.records import Progress
from lora_cli.screen import Screen

if TYPE_CHECKING:
    from lora_cli.executors import Script
    from lora_cli.steps.study.folder import Outcome, Piece, WorkFolder

    ExecutorName = str
else:  # one choice per file of executors/
    ExecutorName = Literal[file_names("lora_cli.executors")]
WHERE = "Where cells are done"


class Placing(Options, frozen=True, kw_only=True):
    """Where a study's cells are done."""

    executor: Annotated[
        ExecutorName,
        Flag(
            help="local: processes on this machine. ray: a Ray cluster. slurm: write a script for sbatch, "
            "and submit nothing.",
            panel=WHERE,
        ),
    ] = "local"
    jobs: Annotated[
        int | None,
        Flag(help="Cells at once.", minimum=1, default="one per GPU, or per core; of slurm one per cell", panel=WHERE),
    ] = None
    address: Annotated[
        str | None,
        Flag(
            help="Of ray: HOST:PORT of a cluster that runs.",
            metavar="HOST:PORT",
            default="$RAY_ADDRESS, else one is started here",
            panel=WHERE,
        ),
    ] = None
    gpus_per_worker: Annotated[
        float | None, Flag(help="Of ray: GPUs, or the share of one.", default="1 on cuda, else 0", panel=WHERE)
    ] = None
    shard: Annotated[
        str | None,
        Flag(help="Do every n-th cell from the i-th on, i from 0; collect brings shards together.", metavar="I/N",
             panel=WHERE),
    ] = None  # fmt: skip

    @property
    def part(self) -> tuple[int, int]:
        """(i, n) of the shard, (0, 1) for all cells. UsageError for a malformed one."""
        if self.shard is None:
            return 0, 1
        place, _, of = self.shard.partition("/")
        if place.isdecimal() and of.isdecimal() and int(place) < int(of):
            return int(place), int(of)
        raise UsageError(f"--shard is I/N with I from 0 to N − 1, such as 0/3, not {self.shard!r}")


def demand_placing(placing: Placing) -> None:
    """UsageError for options that the executor does not take, or a shard for a script that makes shards."""
    from lora_cli.executors import executor

    executor(placing.executor, address=placing.address, gpus_per_worker=placing.gpus_per_worker)
    if placing.executor == "slurm" and placing.shard:
        raise UsageError("--executor slurm makes the shards itself", hint="leave out --shard")


def placed(
    screen: Screen, folder: "WorkFolder", cells: "Sequence[Piece]", placing: Placing, progress: Progress
) -> "Iterator[Outcome] | None":
    """The outcomes of cells as they end; None where a script is written, and shown, that does them elsewhere."""
    from lora_cli.executors import Script, executor

    run = executor(placing.executor, address=placing.address, gpus_per_worker=placing.gpus_per_worker)
    ended = run(folder, cells, jobs=placing.jobs, progress=progress, warn=screen.warn)
    if isinstance(ended, Script):
        _show_script(screen, folder, ended)
        return None
    return ended


def _show_script(screen: Screen, folder: "WorkFolder", script: "Script") -> None:
    """The one command that submits a script, and the one that shows its results."""
    collect = shlex.join(["lora", "study", "collect", str(folder.path.absolute())])
    screen.document(
        "lora.study.script/1",
        {"script": str(script.file), "tasks": script.parts, "submit": script.submit, "collect": collect},
        identity="submit",
    )
