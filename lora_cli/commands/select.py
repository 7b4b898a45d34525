"""`lora select`: choose adapters from the catalogue."""

from pathlib import Path
from typing import Annotated

import typer

from lora_cli.columns import Column, on_request
from lora_cli.commands.options import Command, Listing, Seeded, Where, examples, with_flags
from lora_cli.selection_methods import METHODS
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
    by: Annotated[
        str, typer.Option("--by", help=f"How: {', '.join(METHODS.methods)}.", autocompletion=lambda: [*METHODS.methods])
    ] = "random",
    k: Annotated[int, typer.Option("-k", help="How many.", min=1)] = 30,
    where: Where = None,
    target: Annotated[Path | None, typer.Option("--target", help="Adapter folder to compare with, for cosine.")] = None,
    max_per_author: Annotated[
        int | None, typer.Option("--max-per-author", help="The most adapters of one author.", min=1)
    ] = None,
    name: Annotated[str, typer.Option("--name", help="A name to find this selection by later.")] = "",
    *,
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
            catalogue,
            settings,
            by=by,
            k=k,
            name=name,
            where=where or (),
            max_per_author=max_per_author,
            target=target,
            announce=screen.say,
            progress=progress,
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
    screen.rows("lora.select/1", _COLUMNS, rows, extra={"by": by, **asked})
    few = f", {k - len(chosen)} fewer than asked for" if len(chosen) < k else ""
    screen.say(f"select {by}: {counted(len(chosen), 'adapter')}{few}" + (f", remembered as {name!r}" if name else ""))


def register(root: typer.Typer) -> None:
    """Add `lora select` to the command tree."""
    root.command(
        cls=Command,
        epilog=examples(
            "lora select --by random -k 8 --seed 1",
            "lora select --by rank -k 5 --where 'licence=apache-2.0' --max-per-author 2 -q",
        ),
    )(with_flags(select))
