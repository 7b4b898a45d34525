"""Cells by Slurm: an array script, each of whose tasks does one shard of the study in its folder."""

import shlex
import sys
from collections.abc import Callable, Sequence

from lora_cli.executors import Script
from lora_cli.outputs import whole_file
from lora_cli.records import Progress, silent, unheard
from lora_cli.steps.study.folder import Piece, WorkFolder

FILE = "study.sbatch"
_ON_GPU = "#SBATCH --gpus=1\n"
_SCRIPT = """\
#!/bin/bash
#SBATCH --job-name=lora-study
#SBATCH --array=0-{last}
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
{gpu}#SBATCH --requeue
# Each task does one shard of {parts}: cells that have no result yet. What the command line of sbatch says counts more.
set -eu
exec {command} --shard "$SLURM_ARRAY_TASK_ID/{parts}" --jobs 1
"""


def slurm(
    folder: WorkFolder,
    cells: Sequence[Piece],
    *,
    jobs: int | None = None,
    progress: Progress = silent,
    warn: Callable[[str], None] = unheard,
) -> Script:
    """Write the array script into the study's folder. Nothing is submitted.

    Args:
        jobs: the number of array tasks; by default one per cell, or per row of a sequence.
    """
    path = folder.path.absolute()
    most = folder.most_shards(cells)
    parts = min(jobs or most, most)
    command = shlex.join([sys.executable, "-P", "-m", "lora_cli", "study", "run", str(path)])
    text = _SCRIPT.format(
        last=parts - 1, parts=parts, command=command, gpu=_ON_GPU if folder.device.startswith("cuda") else ""
    )
    with whole_file(path / FILE) as file:
        file.write(text.encode("utf-8", "surrogateescape"))
    return Script(file=path / FILE, parts=parts, submit=shlex.join(["sbatch", str(path / FILE)]))
