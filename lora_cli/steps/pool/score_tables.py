"""What the rows of a table mean: scores of adapters, one a row or one a column, or the facts of an adapter."""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import PurePath
from typing import Any, Literal

import msgspec

from lora_cli.errors import DataError, UsageError
from lora_cli.formats.tables import Row, Table, plain
from lora_cli.metrics import METRICS
from lora_cli.names import in_repo, is_commit, is_folder, is_repo
from lora_cli.records import USABLE, Adapter, ImportedScore
from lora_cli.text import in_words, nearest, shortened

METRIC = "score"
"""The metric of scores for which neither the file nor the user names one: the highest is the best."""
_INDEX = "__index_level_0__"
_IDS = ("adapter", "id", "adapter_id", _INDEX)
_FACTS = {"id", "commit", "source", "repo"}
_MISSING = {"", "nan", "na", "n/a", "<na>", "#n/a", "null", "none"}
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_LONGEST = 500
_MOST = 2**63


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The places of the columns that count, from 0: one score a row (`value`), or one score a column (`tasks`)."""

    names: tuple[str, ...]
    kind: Literal["facts", "long", "wide"]
    id: int = 0
    task: int = 0
    value: int = 0
    metric: int | None = None
    n: int | None = None
    commit: int | None = None
    tasks: tuple[tuple[int, str], ...] = ()
    left: tuple[str, ...] = ()


@dataclass(slots=True, kw_only=True)
class ScoreTable:
    """A table of scores and facts, read row by row. `empty` counts cells without a value, `left` unused columns.

    Args:
        id_column: the column of the ids; by default "adapter" or "id", else the first.
        metric: the metric of scores for which the file names none.
    """

    table: Table
    id_column: str = ""
    metric: str = ""
    empty: int = 0
    left: dict[str, None] = field(default_factory=dict)
    _layout: Layout | None = None

    def read(self) -> Iterator[ImportedScore | tuple[Adapter, int]]:
        """Every score, and every adapter with its line, in the order of the table.

        Raises:
            DataError: a fault, by file, line and column. UsageError: an option that does not fit the columns.
        """
        for row in self.table.rows:
            if self._layout is None or row.names != self._layout.names:
                self._layout = self._laid_out(row)
                self.left.update(dict.fromkeys(self._layout.left))
            match self._layout.kind:
                case "facts":
                    yield self._adapter(row), row.line
                case "long":
                    yield from self._long(row, self._layout)
                case "wide":
                    yield from self._wide(row, self._layout)

    def _laid_out(self, row: Row) -> Layout:
        names = row.names
        lowered = [name.strip().lower() for name in names]
        if {*names} >= _FACTS and not self.id_column:
            if self.table.kind == "csv":
                raise DataError(
                    f"{self.table.path}: the facts of adapters in CSV, which lacks a part of them",
                    hint="lora pool export -o pool.jsonl writes a file that comes back",
                )
            return Layout(names=names, kind="facts")
        id = self._id_place(row, lowered)
        if "task" in lowered and "value" in lowered:
            places = {
                name: lowered.index(name) for name in ("task", "value", "metric", "n", "commit") if name in lowered
            }
            if self.metric and "metric" in places:
                raise UsageError(
                    f"--metric {self.metric}: {self.table.path} has a column of metrics", hint="leave it out"
                )
            used = {id, *places.values()}
            left = tuple(name for place, name in enumerate(names) if place not in used)
            return Layout(names=names, kind="long", id=id, left=left, **places)  # type: ignore[arg-type]
        # Tables of pandas may hold the numbers of their rows.
        numbers = [place for place, name in enumerate(names) if name == _INDEX or (name == "" and place == 0)]
        tasks = [(place, name) for place, name in enumerate(names) if place != id and place not in numbers]
        for place, name in tasks:
            self._demand_name(
                row.line if self.table.kind == "jsonl" else self.table.head, place, name, "the name of a task"
            )
        if not tasks:
            raise DataError(
                f"{self.table.path}: ids and no scores",
                hint="columns are adapter, task, metric, value, n; or the adapter and one per task",
            )
        left = ("the numbers of the rows",) if {*numbers} - {id} else ()
        return Layout(names=names, kind="wide", id=id, tasks=tuple(tasks), left=left)

    def _id_place(self, row: Row, lowered: Sequence[str]) -> int:
        if not self.id_column:
            return next((lowered.index(name) for name in _IDS if name in lowered), 0)
        wanted = self.id_column.strip().lower()
        if wanted not in lowered:
            hint = nearest(wanted, row.names, f"columns are {shortened(', '.join(row.names))}")
            raise UsageError(f"--id-column {self.id_column}: no such column in {self.table.path}", hint=hint)
        return lowered.index(wanted)

    def _long(self, row: Row, layout: Layout) -> Iterator[ImportedScore]:
        id, task = self._id(row, layout.id), self._name(row, layout.task, "the name of a task")
        metric = self.metric or METRIC
        if layout.metric is not None and row.cells[layout.metric] not in (None, ""):
            metric = self._name(row, layout.metric, "the name of a metric")
        value = self._score(row, layout.value, metric)
        if value is not None:
            commit = "" if layout.commit is None else self._commit(row, layout.commit)
            n = 0 if layout.n is None else self._count(row, layout.n)
            yield ImportedScore(f"{id}@{commit}" if commit else id, task, metric, value, n, row.line)

    def _wide(self, row: Row, layout: Layout) -> Iterator[ImportedScore]:
        id, metric = self._id(row, layout.id), self.metric or METRIC
        for place, task in layout.tasks:
            value = self._score(row, place, metric)
            if value is not None:
                yield ImportedScore(id, task, metric, value, 0, row.line)

    def _score(self, row: Row, place: int, metric: str) -> float | None:
        """The score in a cell; None for an empty one."""
        value = self._number(row, place)
        if value is None:
            self.empty += 1
            return None
        low, high = bounds(metric)
        if not low <= value <= high:
            most = f"between {low:g} and {high:g}" if high < math.inf else f"{low:g} or more"
            percents = high == 1 and 1 < value <= 100
            hint = "a share is between 0 and 1: divide percents by 100" if percents else ""
            raise self._fault(row, place, f"{value:g} is out of range: {metric} is {most}", hint)
        return value

    def _id(self, row: Row, place: int) -> str:
        cell = row.cells[place]
        found = plain(cell.strip()) if isinstance(cell, str) else ""
        if not found or _NUMBER.fullmatch(found) or len(found) > _LONGEST:
            raise self._fault(
                row,
                place,
                f"{_shown(cell)} is no id of an adapter",
                "name the column of the ids with --id-column" if not self.id_column else "",
            )
        return found

    def _name(self, row: Row, place: int, what: str) -> str:
        cell = row.cells[place]
        self._demand_name(row.line, place, cell, what, row.names[place])
        return plain(cell.strip())

    def _demand_name(self, line: int, place: int, cell: Any, what: str, column: str = "") -> None:
        if not isinstance(cell, str) or not cell.strip() or len(cell) > _LONGEST:
            raise self.table.fault(line, f"{_shown(cell)} is not {what}", column=place, name=column)

    def _commit(self, row: Row, place: int) -> str:
        cell = row.cells[place]
        if cell in (None, ""):
            return ""
        if not isinstance(cell, str) or not is_commit(cell.strip()):
            raise self._fault(row, place, f"{_shown(cell)} is no commit of 40 hex digits")
        return cell.strip()

    def _count(self, row: Row, place: int) -> int:
        found = self._number(row, place)
        if found is None:
            return 0
        if not found.is_integer() or not 0 <= found < _MOST:
            raise self._fault(row, place, f"{_shown(row.cells[place])} is no number of examples")
        return int(found)

    def _number(self, row: Row, place: int) -> float | None:
        """The number in a cell; None for an empty one or NaN."""
        cell = row.cells[place]
        if isinstance(cell, str):
            text = cell.strip()
            if text.lower() in _MISSING:
                return None
            found = float(text) if _NUMBER.fullmatch(text) else None
        elif cell is None:
            return None
        elif isinstance(cell, int | float | Decimal) and not isinstance(cell, bool):
            found = _float(cell)
        else:
            found = None
        if found is None:
            raise self._fault(row, place, f"{_shown(cell)} is not a number")
        if math.isinf(found):
            raise self._fault(row, place, f"{_shown(cell)} is not a finite number")
        return None if math.isnan(found) else found

    def _adapter(self, row: Row) -> Adapter:
        facts = dict(zip(row.names, row.cells, strict=True))
        try:
            if isinstance(ranks := facts.get("ranks"), str):
                facts["ranks"] = json.loads(ranks)
            adapter = msgspec.convert(facts, Adapter)
        except (msgspec.ValidationError, ValueError, RecursionError) as error:
            raise self.table.fault(row.line, f"no facts of an adapter: {shortened(error)}") from None
        if problem := _problem(adapter):
            raise self.table.fault(row.line, f"no facts of an adapter: {problem}")
        return adapter

    def _fault(self, row: Row, place: int, reason: str, hint: str = "") -> DataError:
        return self.table.fault(row.line, reason, column=place, name=row.names[place], hint=hint)


def bounds(metric: str) -> tuple[float, float]:
    """The least and the greatest value of a metric: a share is in [0, 1], a mean surprise is not negative."""
    known = METRICS.methods.get(metric)
    if known is None:
        return -math.inf, math.inf
    if known.score == "share":
        return 0.0, 1.0
    return (0.0 if known.kind == "likelihood" and known.better == "lower" else -math.inf), math.inf


def _problem(adapter: Adapter) -> str:
    """What is wrong with facts of the right types, "" for nothing."""
    if not adapter.id.strip() or len(adapter.id) > _LONGEST:
        return f"{adapter.id[:80]!r} is no id"
    if not is_commit(adapter.commit):
        return f"commit {adapter.commit[:80]!r} has not 40 hex digits"
    if adapter.source == "folder" and not PurePath(adapter.repo).is_absolute():
        return f"repo {adapter.repo[:80]!r} is no absolute path of a folder"
    if adapter.source == "hub" and adapter.id != in_repo(adapter.repo, adapter.subfolder):
        return f"id {adapter.id[:80]!r} is not that of repo {adapter.repo[:80]!r} and its subfolder"
    # A sync lists repositories of impossible names too, as unusable.
    named = is_repo(adapter.repo) and (not adapter.subfolder or is_folder(adapter.subfolder))
    if adapter.source == "hub" and not named and adapter.status in USABLE:
        return f"id {adapter.id[:80]!r} cannot be on the Hub"
    counts = ("rank", "modules", "layers", "parameters", "bytes", "downloads", "likes")
    wrong = [name for name in counts if not -_MOST <= (getattr(adapter, name) or 0) < _MOST]
    wrong += [name for name in ("alpha", "scale") if not math.isfinite(getattr(adapter, name) or 0)]
    if not all(0 <= rank < 2**31 for rank in adapter.ranks.values()):
        wrong.append("ranks")
    return f"{in_words(wrong)} out of range" if wrong else ""


def _float(number: float | Decimal) -> float:
    try:
        return float(number)
    except OverflowError:
        return math.inf


def _shown(cell: object) -> str:
    return "an empty cell" if cell in (None, "") else repr(shortened(cell))
