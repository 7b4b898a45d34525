"""`lora pool list`: adapters by conditions on their columns."""

from typing import Annotated

import typer

from lora_cli.catalogue.where import sort_column
from lora_cli.commands import completing
from lora_cli.commands.options import Catalogued, Command, Listing, Where, examples, with_flags
from lora_cli.commands.pool.shared import ADAPTERS, Rows, no_adapters, show_adapters


def list_(
    where: Where = None,
    sort: Annotated[
        str,
        typer.Option(
            "--sort",
            help="Column to sort by, smallest, oldest or A first; -COLUMN largest first.",
            autocompletion=completing.sorting,
        ),
    ] = "id",
    n: Rows = None,
    *,
    setup: Catalogued,
    listing: Annotated[Listing, ADAPTERS],
) -> None:
    """List adapters, one row each, unusable ones with the reason.

    Verdicts are those for the base: --base, else the setting; without one, every adapter is listed once.
    Conditions are COLUMN OP VALUE with the operators = != < <= > >= ~ (contains) and !~; numbers may end in k, M or G.
    """
    from lora_cli.catalogue.adapters import Catalogue

    screen, settings = listing.screen(), setup.load()
    with Catalogue(settings.db) as catalogue:
        found = catalogue.find(where or (), base=settings.base, sort=sort, limit=n)
        if not found:
            raise no_adapters(
                catalogue, settings.base, "no adapter" + (" fits these conditions" if where else " is known")
            )
    show_adapters(screen, "lora.pool.list/1", found, sorted_by=sort_column(sort))


def register(pool: typer.Typer) -> None:
    """Add `lora pool list` to the commands of the pool."""
    pool.command(
        "list",
        cls=Command,
        epilog=examples(
            "lora pool list --where 'rank<=16' --sort -downloads -n 20",
            "lora pool list --where status!=ok",
            "lora pool list --base $(lora pool list -n 1 --columns base --fmt tsv | tail -n 1) -n 5",
            "lora pool list --where licence=apache-2.0,mit -q",
        ),
    )(with_flags(list_))
