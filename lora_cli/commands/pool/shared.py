"""The options and rows that several commands of the pool share."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_cli.catalogue.where import COLUMNS
from lora_cli.columns import Column, on_request
from lora_cli.errors import NothingMatched
from lora_cli.records import AdapterRow
from lora_cli.screen import Screen, near
from lora_cli.text import size

if TYPE_CHECKING:
    from lora_cli.catalogue.adapters import Catalogue

ADAPTERS = (
    Column("ADAPTER", "id", wide=True),
    Column("REV", "rev", of="commit", show=lambda row: row["commit"][:7]),
    Column("RANK", "rank", "right"),
    Column("SCALE", "scale", "right", minor=True),
    Column("MODULES", "targets", minor=True, of="target_modules", show=lambda row: _targets(row["target_modules"])),
    Column("SIZE", "bytes", "right", minor=True, show=lambda row: size_of(row)),
    Column("LICENCE", "licence", minor=True),
    Column("BASE", "model", minor=True, of="base", show=lambda row: _model_name(row["base"])),
    Column("STATUS", "state", wide=True, of="status", show=lambda row: _state(row)),
    *on_request(*(key for key in COLUMNS if key not in ("id", "rank", "scale", "bytes", "licence"))),
)

Rows = Annotated[int | None, typer.Option("-n", help="How many at most.", min=1, max=1_000_000_000, show_default="all")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan as data and change nothing.")]
Alias = Annotated[
    list[str] | None, typer.Option("--alias", help="Another name under which adapters declare this base; repeatable.")
]


_BASES_NAMED = 3


def no_adapters(catalogue: "Catalogue", base: str | None, nothing: str) -> NothingMatched:
    """The error for a command that found none: `nothing`, or that no adapter was judged for this base."""
    known = catalogue.bases.counts()
    if not known:
        return NothingMatched(f"{near(catalogue.path)}: {nothing}", hint="lora pool sync fills the catalogue")
    if base and base not in known:
        named = ", ".join(f"{name} ({count:,})" for name, count in [*known.items()][:_BASES_NAMED])
        more = f" and {len(known) - _BASES_NAMED:,} more" if len(known) > _BASES_NAMED else ""
        return NothingMatched(
            f"no adapter was judged for the base {base}",
            hint=f"lora pool sync does that; the catalogue has adapters for {named}{more}: --base NAME shows them",
        )
    return NothingMatched(nothing, hint="lora pool list shows all, lora pool sync looks for more")


def show_adapters(screen: Screen, schema: str, found: Sequence[AdapterRow], sorted_by: str = "") -> None:
    """Print adapters, one row each."""
    screen.rows(schema, ADAPTERS, [facts(adapter) for adapter in found], sorted_by=sorted_by)


def facts(adapter: AdapterRow) -> dict[str, Any]:
    """An adapter for programs: all fields except the long ones, which `show` prints."""
    found = asdict(adapter) | {"target_modules": list(adapter.target_modules)}
    del found["stamp"]
    return found


def size_of(row: Mapping[str, Any]) -> str | None:
    """The size of an adapter in words."""
    return size(row["bytes"]) if row["bytes"] else None


def _state(row: Mapping[str, Any]) -> str:
    """The status, with the reason or the notes."""
    return ": ".join(filter(None, (row["status"], row["reason"] or row["notes"])))


def _model_name(base: str) -> str:
    """A short form of a base: without owner or folder, with its revision."""
    from lora_cli.formats.base_names import at_revision, split_revision

    name, revision = split_revision(base)
    return at_revision(name.replace("\\", "/").rstrip("/").rpartition("/")[2], revision)


def _targets(names: Sequence[str]) -> str:
    """A short form of target modules: the seven of a Llama are "all linear"."""
    short = [name.removesuffix("_proj") for name in names]
    return "all linear" if sorted(short) == ["down", "gate", "k", "o", "q", "up", "v"] else ",".join(short)
