"""`lora runs`: the recorded runs, their inputs and their outcomes."""

from pathlib import Path
from typing import Annotated

import typer

from lora_cli.commands import completing
from lora_cli.commands.options import Command, Document, Group, Listing, Stored, examples, screen_for, with_flags
from lora_cli.screen import Column, near
from lora_cli.text import counted

app = typer.Typer(cls=Group, help="The recorded runs of all commands, with their inputs and outcomes.")

_COLUMNS = (
    Column("RUN", "id"),
    Column("COMMAND", "command", minor=True),
    Column("STATUS", "status"),
    Column("STARTED", "started", minor=True),
    Column("OUTPUT", "out", wide=True),
)


@app.command("list", cls=Command, epilog=examples("lora runs list -n 5", "lora runs list --command fit --json"))
@with_flags
def list_(
    command: Annotated[str | None, typer.Option("--command", help="Only runs of this command.")] = None,
    n: Annotated[int, typer.Option("-n", help="How many at most.", min=1, max=1_000_000_000)] = 50,
    *,
    setup: Stored,
    listing: Listing,
) -> None:
    """List the latest runs, newest first."""
    from lora_cli.catalogue import runs

    rows = [
        {key: row[key] for key in ("id", "command", "status", "started", "ended", "out", "error")}
        for row in runs.all_runs(setup.load().db, command=command, limit=n)
    ]
    for row in rows:
        row["started"] = row["started"][:19]
        if row["out"]:
            row["out"] = near(Path(row["out"]))
    listing.screen().rows("lora.runs.list/1", _COLUMNS, rows)


@app.command(
    cls=Command,
    epilog=examples(
        "lora runs show $(lora runs list -q -n 1)", "lora runs show $(lora runs list --command merge -q -n 1) --json"
    ),
)
@with_flags
def show(
    run: Annotated[str, typer.Argument(help="The run's id, or the start of it.", autocompletion=completing.runs)],
    *,
    setup: Stored,
    form: Document,
) -> None:
    """Show one run: settings, inputs, versions, outputs and scores."""
    from lora_cli.catalogue import runs

    form.screen().document("lora.runs.show/1", runs.find(setup.load().db, run))


@app.command(
    cls=Command,
    epilog=examples("lora runs rm $(lora runs list -q -n 1)", "lora runs list --command eval -q | xargs lora runs rm"),
)
@with_flags
def rm(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Ids, or the starts of them.", autocompletion=completing.runs)
    ],
    *,
    setup: Stored,
) -> None:
    """Forget runs and their scores. Their output files stay."""
    from lora_cli.catalogue.runs import find, remove

    file = setup.load().db
    ids = list(dict.fromkeys(str(find(file, run)["id"]) for run in runs))
    remove(file, ids)
    screen_for().say(f"forgot {counted(len(ids), 'run')}")


def register(root: typer.Typer) -> None:
    """Add `lora runs` to the command tree."""
    root.add_typer(app, name="runs")
