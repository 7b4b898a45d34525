"""Adapters as rows of the database, and rows as adapters."""

import gc
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from sys import intern
from typing import Any, NamedTuple

from lora_cli.records import Adapter


class Known(NamedTuple):
    """The facts of a row that a sync's plan needs: version and status."""

    commit: str
    status: str
    stamp: str
    repo: str
    base_declared: str
    base: str
    downloads: int
    likes: int


def quoted(names: Iterable[str]) -> str:
    """Names of columns for SQL: `commit` is one of its words."""
    return ", ".join(f'"{name}"' for name in names)


@contextmanager
def uncollected() -> Iterator[None]:
    """No search for garbage while many rows are made: none of them is garbage, and each search looks at all."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


_LISTS = ("target_modules", "datasets")
WRITTEN = (*(field.name for field in fields(Adapter)), "rank_total", "hub_id", "seen_at", "judged_for")
"""The columns of a row that is stored."""
_NEW = {name: f'excluded."{name}"' for name in WRITTEN if name != "id"}
_HELD = "adapters.status = 'quarantined' AND adapters.\"commit\" = excluded.\"commit\" AND excluded.status = 'ok'"
# A quarantine stays as long as the commit does: other checks know nothing of it.
_NEW |= {name: f"CASE WHEN {_HELD} THEN adapters.{name} ELSE excluded.{name} END" for name in ("status", "reason")}
# Store a row by its id, in place of an earlier one.
UPSERT = (
    f"INSERT INTO adapters ({quoted(WRITTEN)}) VALUES ({', '.join('?' * len(WRITTEN))}) "
    "ON CONFLICT (id) DO UPDATE SET " + ", ".join(f'"{name}" = {value}' for name, value in _NEW.items())
)


def row_of(adapter: Adapter) -> list[Any]:
    """The values of an adapter's fields as SQLite stores them, in their order."""
    values = []
    for field in fields(Adapter):
        value = getattr(adapter, field.name)
        if field.name == "ranks":
            value = json.dumps(dict(value))
        elif field.name in _LISTS:
            value = json.dumps(list(value))
        elif isinstance(value, bool):
            value = int(value)
        elif isinstance(value, str):
            value = text(value)
        values.append(value)
    return values


def parsed(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a record from what SQLite stored of them."""
    if "ranks" in values:
        values["ranks"] = {intern(name): rank for name, rank in json.loads(values["ranks"]).items()}
    values |= {name: tuple(json.loads(values[name])) for name in _LISTS if name in values}
    if "rslora" in values:
        values["rslora"] = bool(values["rslora"])
    return values


def text(value: str) -> str:
    """`value` with lone surrogates escaped: arguments and file names may hold them, and SQLite takes only Unicode."""
    return value.encode("utf-8", "backslashreplace").decode()


def clean(values: Iterable[Any]) -> list[Any]:
    """`values` with every text as SQLite takes it."""
    return [text(value) if isinstance(value, str) else value for value in values]


def most_frequent(counts: Counter[Any], most: int) -> dict[str, int]:
    """The most frequent values as texts, those of one count in their order, what is not known first."""
    values = sorted(counts, key=lambda value: (-counts[value], value is not None, value))[:most]
    return {"" if value is None else str(value): counts[value] for value in values}
