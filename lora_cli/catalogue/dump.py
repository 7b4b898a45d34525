"""The rows of the catalogue as a stream: adapters with all their facts, and the newest score of each."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any

from lora_cli.catalogue.database import open_for_reading
from lora_cli.catalogue.rows import clean, quoted
from lora_cli.catalogue.where import conditions
from lora_cli.records import Adapter

FACTS = tuple(field.name for field in fields(Adapter))
"""The columns of an adapter; `ranks` and `card`, the long ones, are the last."""
SCORES = ("adapter", "commit", "task", "metric", "value", "n")
"""The columns of a score, as an import reads them; `commit` is "" where nobody told which version was scored."""
_AT_ONCE = 64


def adapters(path: Path, where: Sequence[str] = (), *, long: bool = True) -> Iterator[list[tuple[Any, ...]]]:
    """Batches of adapters as stored, the columns those of FACTS, without `ranks` and `card` unless `long`."""
    test, values = conditions(where)
    names = FACTS if long else FACTS[:-2]
    yield from _batches(path, f"SELECT {quoted(names)} FROM adapters WHERE {test} ORDER BY key", values)


def scores(path: Path, where: Sequence[str] = ()) -> Iterator[list[tuple[Any, ...]]]:
    """Batches of the newest scores of adapters, the columns those of SCORES."""
    test, values = conditions(where)
    yield from _batches(
        path,
        'SELECT id, "commit", task, metric, value, n FROM adapter_scores '
        f"WHERE adapter IN (SELECT key FROM adapters WHERE {test}) ORDER BY adapter, task, metric",
        values,
    )


def scores_of(path: Path, id: str) -> dict[str, dict[str, float]]:
    """The newest scores of an adapter: metric → task → value."""
    found: dict[str, dict[str, float]] = {}
    query = "SELECT metric, task, value FROM adapter_scores WHERE id = ? ORDER BY metric, task"
    for batch in _batches(path, query, [id]):
        for metric, task, value in batch:
            found.setdefault(metric, {})[task] = value
    return found


def _batches(path: Path, query: str, values: Sequence[Any]) -> Iterator[list[tuple[Any, ...]]]:
    with closing(open_for_reading(path)) as db:
        rows = db.execute(query, clean(values))
        while batch := rows.fetchmany(_AT_ONCE):
            yield batch
