"""`lora select`: choose adapters from the catalogue."""

from pathlib import Path
from typing import Annotated

import typer

from lora_cli.commands.options import Base, Csv, Db, Json, Jsonl, Quiet, Seed, Where, examples, screen_for
from lora_cli.errors import NothingMatched
from lora_cli.methods import MethodFolder
from lora_cli.screen import Column
from lora_cli.settings import load

METHODS = MethodFolder("lora_cli.selection_methods", "selection method")

_COLUMNS = (
    Column("ADAPTER", "id", wide=True),
    Column("REV", "rev"),
    Column("RANK", "rank", "right"),
    Column("DOWNLOADS", "downloads", "right", minor=True),
    Column("SCORE", "score", "right"),
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
    base: Base = None,
    seed: Seed = None,
    db: Db = None,
    json: Json = False,
    jsonl: Jsonl = False,
    csv: Csv = False,
    quiet: Quiet = False,
) -> None:
    """Choose usable adapters of one base model and remember the choice.

    The ids go to stdout; merge and fit take the last selection if no adapters are named. random is the control: a
    useful selection method has to beat it.
    """
    from lora_cli.catalogue import Catalogue
    from lora_cli.steps.select import select as step

    screen = screen_for(json, jsonl, csv, quiet)
    settings = load({"base": base, "seed": seed, "db": db})
    with Catalogue(settings.db) as catalogue, screen.progress() as progress:
        chosen = step(
            catalogue,
            by=by,
            k=k,
            base=settings.base,
            where=where or [],
            seed=settings.seed,
            max_per_author=max_per_author,
            target=target,
            announce=screen.say,
            progress=progress,
        )
        if not chosen:
            raise NothingMatched("no adapter fits")
        asked = {
            "k": k,
            "base": settings.base,
            "where": where or [],
            "seed": settings.seed,
            "max_per_author": max_per_author,
            "target": str(target.resolve()) if target else None,
        }
        catalogue.remember_selection(name, chosen, by, asked)
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
    screen.say(f"select {by}: {len(chosen)} adapters{few}" + (f", remembered as {name!r}" if name else ""))


def register(root: typer.Typer) -> None:
    """Add `lora select` to the command tree."""
    root.command(
        epilog=examples(
            "lora select --by random -k 8 --seed 1",
            "lora select --by rank -k 5 --where 'licence=apache-2.0' --max-per-author 2 -q",
        )
    )(select)
