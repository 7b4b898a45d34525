"""`lora pool path`: the place of the catalogue."""

import typer

from lora_cli.commands.options import Command, Stored, examples, screen_for, with_flags


def path(*, setup: Stored) -> None:
    """Print the path of the catalogue's database."""
    screen_for().text(f"{setup.load().db}\n")


def register(pool: typer.Typer) -> None:
    """Add `lora pool path` to the commands of the pool."""
    pool.command(cls=Command, epilog=examples("lora pool path", 'cp "$(lora pool path)" catalogue-backup.db'))(
        with_flags(path)
    )
