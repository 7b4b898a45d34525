"""`lora pool export`: the catalogue as a file."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from lora_cli.commands.options import Command, Stored, Where, examples, screen_for, with_flags
from lora_cli.errors import UsageError
from lora_cli.screen import near
from lora_cli.text import counted

_ENDINGS: dict[str, Literal["jsonl", "csv", "parquet"]] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
}
_BEGINNINGS = (b'{"id":"', b'{"adapter":"', b"id,commit,", b"adapter,commit,", b"PAR1")
"""The first bytes of an export, by table and form."""


def export(
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="FILE", help="The file, replaced if it is there.", show_default="stdout"),
    ] = None,
    what: Annotated[
        Literal["all", "adapters", "scores"],
        typer.Option("--what", help="Adapters, their newest scores, or both; CSV and Parquet hold one table."),
    ] = "all",
    fmt: Annotated[
        Literal["jsonl", "csv", "parquet"] | None,
        typer.Option("--fmt", help="The format.", show_default="by the file's ending, else jsonl"),
    ] = None,
    where: Where = None,
    *,
    setup: Stored,
) -> None:
    """Write adapters with all their facts, and their newest scores, to a file or stdout.

    `lora pool import` takes JSONL and Parquet back as they were. CSV is for spreadsheets: it has neither the model
    cards nor the rank of each module, and a text that a spreadsheet would run begins with an apostrophe.
    """
    from lora_cli.outputs import demand_own, whole_file
    from lora_cli.steps.pool.exporting import Export

    screen = screen_for()
    form = fmt or ("jsonl" if out is None else _ENDINGS.get(out.suffix.lower()))
    if form is None:
        raise UsageError(f"{out}: no known ending", hint=f"{', '.join(_ENDINGS)}, or --fmt")
    if form == "parquet" and out is None:
        raise UsageError("Parquet is for a file", hint="give -o FILE.parquet")
    if out is not None:
        demand_own(out, _BEGINNINGS, "export of a pool")
    with screen.progress() as progress:
        job = Export(setup.load().db, form, what, where or (), progress)
        if out is None:
            for part in job.text():
                screen.text(part)
        else:
            with whole_file(out) as file:
                job.write(file)
    if out is not None:
        screen.text(f"{near(out)}\n")
    parts = {"adapters": counted(job.found.adapters, "adapter"), "scores": counted(job.found.scores, "score")}
    screen.say(" · ".join(text for name, text in parts.items() if what in ("all", name)))


def register(pool: typer.Typer) -> None:
    """Add `lora pool export` to the commands of the pool."""
    pool.command(
        cls=Command,
        epilog=examples(
            "lora pool export -o pool.jsonl",
            "lora pool export --what adapters --where 'rank<=16' -o small.csv",
        ),
    )(with_flags(export))
