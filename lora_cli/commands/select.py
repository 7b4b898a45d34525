"""`lora select`: choose adapters from the catalogue."""

from typing import Annotated

import typer

from lora_cli.columns import Column, on_request
from lora_cli.commands.options import Command, Listing, Seeded, examples, with_flags
from lora_cli.recipes import SelectOptions
from lora_cli.text import counted

_COLUMNS = (
    Column("ADAPTER", "id", wide=True),
    Column("REV", "rev"),
    Column("RANK", "rank", "right"),
    Column("DOWNLOADS", "downloads", "right", minor=True),
    Column("SCORE", "score", "right"),
    *on_request("commit"),
)


def select(
    name: Annotated[str, typer.Option("--name", help="A name to find this selection by later.")] = "",
    *,
    options: SelectOptions,
    setup: Seeded,
    listing: Annotated[Listing, _COLUMNS],
) -> None:
    """Choose usable adapters of one base model and remember the choice.

    The ids go to stdout; merge and fit take the last selection if no adapters are named. random is the control: a
    useful selection method has to beat it.
    """
    from lora_cli.catalogue.adapters import Catalogue
    from lora_cli.steps.pool.select import select_and_remember

    screen, settings = listing.screen(), setup.load()
    with screen.progress() as progress, Catalogue(settings.db) as catalogue:
        chosen, asked = select_and_remember(
            catalogue, settings, options, name=name, announce=screen.say, progress=progress
        )
    rows = [
        {
            "id": adapter.id,
            "commit": adapter.commit,
            "rev": adapter.commit[:7],
            "rank": adapter.rank,
            "downloads": adapter.downloads,
            "score": score,
        }
        for adapter, score in chosen
    ]
    screen.rows("lora.select/1", _COLUMNS, rows, extra={"by": options.by, **asked})
    few = f", {options.k - len(chosen)} fewer than asked for" if len(chosen) < options.k else ""
    named = f", remembered as {name!r}" if name else ""
    screen.say(f"select {options.by}: {counted(len(chosen), 'adapter')}{few}{named}")


def register(root: typer.Typer) -> None:
    """Add `lora select` to the command tree."""
    root.command(
        cls=Command,
        epilog=examples(
            "lora select --by random -k 8 --seed 1",
            "lora select --by rank -k 5 --where 'licence=apache-2.0' --max-per-author 2 -q",
        ),
    )(with_flags(select))
