"""`lora pool selections`: list and drop selections."""

from typing import Annotated

import typer

from lora_cli.columns import Column
from lora_cli.commands import completing
from lora_cli.commands.options import Command, Listing, Stored, examples, with_flags
from lora_cli.errors import NothingMatched
from lora_cli.text import counted

_SELECTIONS = (
    Column("NUMBER", "id", "right"),
    Column("NAME", "name", wide=True),
    Column("METHOD", "method"),
    Column("ADAPTERS", "adapters", "right"),
    Column("MADE", "created", minor=True),
)


def selections(
    drop: Annotated[
        str | None,
        typer.Option(
            "--drop", help="Forget the selections of this name or number.", autocompletion=completing.selections
        ),
    ] = None,
    *,
    setup: Stored,
    listing: Annotated[Listing, _SELECTIONS],
) -> None:
    """List the selections, the newest first, or drop some."""
    from lora_cli.catalogue.adapters import Catalogue

    screen = listing.screen()
    with Catalogue(setup.load().db) as catalogue:
        if drop is not None:
            count = catalogue.selections.drop(drop)
            if not count:
                raise NothingMatched(f"no selection {drop!r}", hint="see lora pool selections")
            screen.say(f"dropped {counted(count, 'selection')}")
            return
        rows = catalogue.selections.all()
    shown = [{**row, "created": row["created"][:19]} for row in rows]
    screen.rows("lora.pool.selections/1", _SELECTIONS, shown)


def register(pool: typer.Typer) -> None:
    """Add `lora pool selections` to the commands of the pool."""
    pool.command(
        cls=Command,
        epilog=examples("lora pool selections", "lora select -k 2 --name two && lora pool selections --drop two"),
    )(with_flags(selections))
