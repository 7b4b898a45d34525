"""A group of commands, each in the file of its name, imported when it is named: no command pays for the others."""

import importlib
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, ClassVar

import typer
from typer.main import get_group

from lora_cli.commands.options import Group

if TYPE_CHECKING:
    # Typer keeps its copy of Click private; its classes are named here for the types alone.
    from typer._click import Command, Context, HelpFormatter


class LazyGroup(Group):
    """A command whose subcommands are the files of a package."""

    package: ClassVar[str]
    """The package that holds the files."""
    summaries: ClassVar[Mapping[str, str]]
    """The commands in the order of a typical workflow; the first sentence of each one's help."""

    def __init__(self, **attributes: object) -> None:
        super().__init__(**attributes)  # type: ignore[arg-type]
        # The names only, for suggestions on a mistyped one; `get_command` imports the commands.
        self.commands = dict.fromkeys(self.summaries)  # type: ignore[assignment]

    def list_commands(self, ctx: "Context") -> list[str]:
        return [*self.summaries]

    def get_command(self, ctx: "Context", cmd_name: str) -> "Command | None":
        return _command(self.package, cmd_name) if cmd_name in self.summaries else None

    def format_commands(self, ctx: "Context", formatter: "HelpFormatter") -> None:
        with formatter.section("Commands"):
            formatter.write_dl([*self.summaries.items()])


@cache
def _command(package: str, name: str) -> "Command":
    """The command in the file of its name."""
    holder = typer.Typer(rich_markup_mode=None)
    importlib.import_module(f"{package}.{name.replace('-', '_')}").register(holder)
    return get_group(holder).commands[name]
