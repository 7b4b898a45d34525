"""`lora study collect`: the shards of a study brought together."""

from pathlib import Path
from typing import Annotated

import typer

from lora_cli.commands.options import OUTPUT, Command, Listing, examples, with_flags
from lora_cli.commands.study.shown import LINES, show_collected
from lora_cli.errors import Partial
from lora_cli.text import counted


def collect(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders of one study, or of one sequence.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for all of it.", show_default="the first", rich_help_panel=OUTPUT),
    ] = None,
    *,
    listing: Annotated[Listing, LINES],
) -> None:
    """Bring the folders of a study's shards together, and write its table.

    The order of the folders does not matter, and collecting twice changes nothing. A cell that two folders hold is
    compared byte for byte: a difference is an error that names both. Cells of the plan that nobody has done are counted
    (exit code 6).
    """
    screen = listing.screen()
    with screen.progress() as progress:
        found = show_collected(screen, folders, out, progress)
    if found.missing:
        failed = f", {len(found.failed):,} of them failed" if found.failed else ""
        raise Partial(
            f"{counted(found.missing, 'cell')} of {found.planned:,} not done{failed}",
            hint="collect the other shards too, or run the study again",
        )


def register(root: typer.Typer) -> None:
    """Add `lora study collect` to the command tree."""
    root.command(
        cls=Command,
        epilog=examples(
            "lora study collect study",
            "lora study --quick -k 2 --shard 0/1 -o part && lora study collect part -o whole",
        ),
    )(with_flags(collect))
