"""`lora pool show`: all facts about one adapter."""

from dataclasses import asdict
from typing import Annotated

import typer

from lora_cli.commands import completing
from lora_cli.commands.options import Command, Document, Stored, examples, with_flags


def show(
    adapter: Annotated[
        str,
        typer.Argument(help="Id (with @commit for that version only) or folder.", autocompletion=completing.adapters),
    ],
    *,
    setup: Stored,
    form: Document,
) -> None:
    """Show all facts about one adapter, their sources, its newest scores, and the reason if it is unusable."""
    from lora_cli.catalogue.adapters import Catalogue
    from lora_cli.catalogue.dump import scores_of
    from lora_cli.catalogue.runs import pushed_as
    from lora_cli.formats.store import locate

    screen = form.screen()
    db = setup.load().db
    with Catalogue(db) as catalogue:
        row = catalogue.named(adapter)
        provenance = catalogue.provenance(row.id) | {"pushed": pushed_as(db, row.commit)}
    files = locate(row.ref)
    facts = asdict(row) | {"target_modules": list(row.target_modules), "ranks": dict(row.ranks)}
    order = (
        "id",
        "status",
        "reason",
        *(key for key in facts if key not in ("id", "status", "reason", "card", "ranks")),
    )
    weights = str(files.weights) if files else None
    rest = {
        **provenance,
        "weights": weights,
        "scores": scores_of(db, row.id),
        "ranks": facts["ranks"],
        "card": facts["card"],
    }
    screen.document("lora.pool.show/1", {key: facts[key] for key in order} | rest)


def register(pool: typer.Typer) -> None:
    """Add `lora pool show` to the commands of the pool."""
    pool.command(
        cls=Command,
        epilog=examples(
            "lora pool show $(lora pool list -q -n 1)", "lora pool show $(lora pool list -q -n 1 --sort rank) --json"
        ),
    )(with_flags(show))
