"""`lora runs`: the recorded runs, their inputs and their outcomes."""

from pathlib import Path
from typing import Annotated

import typer

from lora_cli.commands import completing
from lora_cli.commands.options import Csv, Db, Group, Json, Jsonl, Quiet, examples, screen_for
from lora_cli.screen import Column, near
from lora_cli.settings import load

app = typer.Typer(cls=Group, help="The recorded runs of all commands, with their inputs and outcomes.")

_COLUMNS = (
    Column("RUN", "id"),
    Column("COMMAND", "command", minor=True),
    Column("STATUS", "status"),
    Column("STARTED", "started", minor=True),
    Column("OUTPUT", "out", wide=True),
)


@app.command("list", epilog=examples("lora runs list -n 5", "lora runs list --command fit --json"))
def list_(
    command: Annotated[str | None, typer.Option("--command", help="Only runs of this command.")] = None,
    n: Annotated[int, typer.Option("-n", help="How many at most.", min=1, max=1_000_000_000)] = 50,
    db: Db = None,
    json: Json = False,
    jsonl: Jsonl = False,
    csv: Csv = False,
    quiet: Quiet = False,
) -> None:
    """List the latest runs, newest first."""
    from lora_cli import runs

    rows = [
        {key: row[key] for key in ("id", "command", "status", "started", "ended", "out", "error")}
        for row in runs.all_runs(load({"db": db}).db, command=command, limit=n)
    ]
    for row in rows:
        row["started"] = row["started"][:19]
        if row["out"]:
            row["out"] = near(Path(row["out"]))
    screen_for(json, jsonl, csv, quiet).rows("lora.runs.list/1", _COLUMNS, rows)


@app.command(
    epilog=examples(
        "lora runs show $(lora runs list -q -n 1)", "lora runs show $(lora runs list --command merge -q -n 1) --json"
    )
)
def show(
    run: Annotated[str, typer.Argument(help="The run's id, or the start of it.", autocompletion=completing.runs)],
    db: Db = None,
    json: Json = False,
) -> None:
    """Show one run: settings, inputs, versions, outputs and scores."""
    from lora_cli import runs

    screen_for(json).document("lora.runs.show/1", runs.find(load({"db": db}).db, run))


@app.command(
    epilog=examples("lora runs rm $(lora runs list -q -n 1)", "lora runs list --command eval -q | xargs lora runs rm")
)
def rm(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Ids, or the starts of them.", autocompletion=completing.runs)
    ],
    db: Db = None,
) -> None:
    """Forget runs and their scores. Their output files stay."""
    from lora_cli.runs import find, remove

    file = load({"db": db}).db
    ids = list(dict.fromkeys(str(find(file, run)["id"]) for run in runs))
    remove(file, ids)
    screen_for().say(f"forgot {len(ids)} run{'s'[: len(ids) != 1]}")


def register(root: typer.Typer) -> None:
    """Add `lora runs` to the command tree."""
    root.add_typer(app, name="runs")
