"""`lora config`: the settings, and where each comes from."""

from pathlib import Path
from typing import Annotated

import typer

from lora_cli.columns import Column, on_request
from lora_cli.commands.options import Command, Group, Listing, examples, with_flags
from lora_cli.settings import KEYS, base_names_file, load

app = typer.Typer(cls=Group, help="Settings and where each comes from.")

_COLUMNS = (Column("SETTING", "id"), Column("VALUE", "value", wide=True), Column("FROM", "origin"), *on_request("help"))


@app.command(cls=Command, epilog=examples("lora config show", "LORA_DEVICE=cpu lora config show --json"))
@with_flags
def show(*, listing: Annotated[Listing, _COLUMNS]) -> None:
    """Print every setting, its value and where it was found.

    A flag of a command beats an environment variable LORA_<SETTING>, which beats ./lora.toml, which beats the user's
    own configuration file, which beats the default.
    """
    settings = load()
    rows = [
        {"id": name, "value": _plain(getattr(settings, name)), "origin": settings.origin(name), "help": key.help}
        for name, key in KEYS.items()
    ]
    file, origin = base_names_file()
    rows.append({"id": "base_names", "value": str(file), "origin": origin, "help": "more names of base models, TOML"})
    listing.screen().rows("lora.config.show/1", _COLUMNS, rows)


def register(root: typer.Typer) -> None:
    """Add `lora config` to the command tree."""
    root.add_typer(app, name="config")


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
