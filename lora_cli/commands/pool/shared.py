"""The options and rows that several commands of the pool share."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer

from lora_cli.errors import NothingMatched
from lora_cli.records import AdapterRow
from lora_cli.screen import Column, Screen
from lora_cli.text import size

_ADAPTERS = (
    Column("ADAPTER", "id", wide=True),
    Column("REV", "rev"),
    Column("RANK", "rank", "right"),
    Column("SCALE", "scale", "right", minor=True),
    Column("MODULES", "targets", minor=True),
    Column("SIZE", "size", "right", minor=True),
    Column("LICENCE", "licence", minor=True),
    Column("BASE", "model", minor=True),
    Column("STATUS", "state", wide=True),
)

Rows = Annotated[int | None, typer.Option("-n", help="How many at most.", min=1, max=1_000_000_000, show_default="all")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan as data and change nothing.")]
Alias = Annotated[
    list[str] | None, typer.Option("--alias", help="Another name under which adapters declare this base; repeatable.")
]


def show_adapters(screen: Screen, schema: str, found: Sequence[AdapterRow], nothing: str) -> None:
    """Print adapters, one row each. NothingMatched, with the message `nothing`, if there are none."""
    if not found:
        raise NothingMatched(nothing, hint="lora pool list shows all, lora pool sync looks for more")
    rows = [_as_row(adapter) if screen.format == "auto" else facts(adapter) for adapter in found]
    screen.rows(schema, _ADAPTERS, rows)


def facts(adapter: AdapterRow) -> dict[str, Any]:
    """An adapter for programs: all fields except the long ones, which `show` prints."""
    found = asdict(adapter) | {"target_modules": list(adapter.target_modules)}
    del found["stamp"]
    return found


def _as_row(adapter: AdapterRow) -> dict[str, Any]:
    """An adapter for people."""
    return {
        **facts(adapter),
        "rev": adapter.commit[:7],
        "targets": _targets(adapter.target_modules),
        "model": _model_name(adapter.base),
        "size": size(adapter.bytes) if adapter.bytes else None,
        "state": ": ".join(filter(None, (adapter.status, adapter.reason or adapter.notes))),
    }


def _model_name(base: str) -> str:
    """A short form of a base: without owner or folder, with its revision."""
    from lora_cli.formats.base_names import at_revision, split_revision

    name, revision = split_revision(base)
    return at_revision(name.replace("\\", "/").rstrip("/").rpartition("/")[2], revision)


def _targets(names: tuple[str, ...]) -> str:
    """A short form of target modules: the seven of a Llama are "all linear"."""
    short = [name.removesuffix("_proj") for name in names]
    return "all linear" if sorted(short) == ["down", "gate", "k", "o", "q", "up", "v"] else ",".join(short)
