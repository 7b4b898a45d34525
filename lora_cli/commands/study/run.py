"""`lora study run`: the cells of a planned folder."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from lora_cli.commands.options import Command, Listing, examples, with_flags
from lora_cli.commands.study.placing import Placing, demand_placing, placed
from lora_cli.commands.study.shown import LINES, say_outcome, show_collected


def run(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a study or a sequence.", show_default=False)],
    *,
    placing: Placing,
    listing: Annotated[Listing, LINES],
) -> None:
    """Do the cells of a study's folder that have no result yet.

    The folder holds all that the study was asked for, so that this needs neither catalogue nor settings: only the
    folder, the base and the adapters, at the same versions of lora's packages. A machine that shares the folder can do
    a shard of it; the tasks of --executor slurm are this command.
    """
    screen, shard = listing.screen(), placing.part
    demand_placing(placing)

    from lora_cli.steps.study.run import demand_done, failures
    from lora_cli.steps.study.workers import folder_in

    with screen.progress() as progress:
        planned = folder_in(folder)
        cells = planned.shard(shard)
        outcomes = placed(screen, planned, cells, placing, progress)
        if outcomes is None:
            return
        failed = failures(planned, outcomes, partial(say_outcome, screen))
        show_collected(screen, [folder], None, progress)
    demand_done(failed, len(cells))


def register(root: typer.Typer) -> None:
    """Add `lora study run` to the command tree."""
    root.command(cls=Command, epilog=examples("lora study run study --shard 0/3", "lora study run study --jobs 4"))(
        with_flags(run)
    )
