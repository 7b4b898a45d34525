"""`lora pool rm`: forget adapters."""

from typing import Annotated

import typer

from lora_cli.commands import completing
from lora_cli.commands.options import Command, Stored, examples, screen_for, with_flags
from lora_cli.commands.pool.shared import DryRun
from lora_cli.text import counted


def rm(
    adapter: Annotated[
        list[str],
        typer.Argument(metavar="ADAPTER...", help="Ids, - for stdin.", autocompletion=completing.adapters),
    ],
    dry_run: DryRun = False,
    *,
    setup: Stored,
) -> None:
    """Forget adapters: delete their rows, keep their files. The next sync adds those that it finds again."""
    from lora_cli.catalogue.adapters import Catalogue
    from lora_cli.commands.chosen import expand

    screen = screen_for()
    with Catalogue(setup.load().db) as catalogue:
        ids = list(dict.fromkeys(catalogue.named(text).id for text in expand(adapter)))
        if dry_run:
            screen.text("".join(f"{id}\n" for id in ids))
            return
        catalogue.remove(ids)
    screen.say(f"forgot {counted(len(ids), 'adapter')}; their files stay where they are")


def register(pool: typer.Typer) -> None:
    """Add `lora pool rm` to the commands of the pool."""
    pool.command(
        cls=Command,
        epilog=examples(
            "lora pool rm $(lora pool list --where status!=ok -q -n 1)",
            "lora pool list --where 'status!=ok' -q | lora pool rm - --dry-run",
        ),
    )(with_flags(rm))
