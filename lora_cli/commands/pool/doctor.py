"""`lora pool doctor`: is the catalogue's file whole?"""

from typing import Annotated

import typer

from lora_cli.commands.options import Command, Stored, examples, screen_for, with_flags


def doctor(
    rescue: Annotated[
        bool, typer.Option("--rescue", help="Copy the whole rows of a damaged file into a new one, which replaces it.")
    ] = False,
    *,
    setup: Stored,
) -> None:
    """Check every page of the catalogue's database; with --rescue save the whole rows of a damaged one.

    The damaged file is kept beside the new one, with the ending .damaged.
    """
    from lora_cli.catalogue.doctor import check
    from lora_cli.catalogue.doctor import rescue as save
    from lora_cli.errors import DataError
    from lora_cli.text import counted

    screen, db = screen_for(), setup.load().db
    problems = check(db)
    if not problems:
        screen.say(f"{db} is whole")
        return
    for problem in problems:
        screen.say(problem)
    if not rescue:
        raise DataError(f"{db} is damaged", hint="lora pool doctor --rescue saves its whole rows")
    result = save(db)
    kept = ", ".join(f"{counted(count, 'row')} of {table}" for table, count in result.kept.items())
    screen.say(f"saved {kept}; the damaged file is {result.damaged}")
    for table, names in result.lost.items():
        screen.say(f"lost of {table}: {', '.join(names)}")


def register(pool: typer.Typer) -> None:
    """Add `lora pool doctor` to the commands of the pool."""
    pool.command(cls=Command, epilog=examples("lora pool doctor", "lora pool doctor --rescue"))(with_flags(doctor))
