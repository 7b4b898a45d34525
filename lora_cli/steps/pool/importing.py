"""Scores and facts that people already have, taken into the catalogue: the whole file, or nothing of it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TypeVar

from lora_cli.catalogue.imports import Staging, Twice
from lora_cli.errors import DataError, NothingMatched
from lora_cli.formats.tables import Table, open_table
from lora_cli.hashes import file_sha256
from lora_cli.records import ImportCounts, ImportedScore, Progress, patient, silent
from lora_cli.steps.pool.score_tables import ScoreTable
from lora_cli.text import counted, shortened

T = TypeVar("T")
_AT_ONCE = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """An import: what the file held, and the run that stored it, "" if there was nothing to store.

    `empty` counts cells without a value, `left` names unused columns, `renamed` columns whose name came again: place
    from 1, name in the file, name of the task.
    """

    counts: ImportCounts
    empty: int
    left: tuple[str, ...]
    renamed: tuple[tuple[int, str, str], ...]
    run: str = ""


def import_table(
    db: Path,
    file: Path,
    *,
    id_column: str = "",
    metric: str = "",
    dry_run: bool = False,
    progress: Progress = silent,
) -> Imported:
    """Take the scores and the facts of adapters in `file` (see `open_table`, `ScoreTable`) into the catalogue.

    All of it is read and judged first, then written in one transaction. What the catalogue holds already stays as it
    is; a score with another value is replaced. Memory does not grow with the file.

    Args:
        dry_run: judge alone, and change nothing.

    Raises:
        DataError: a fault of the file, by line and column.
        NothingMatched: no adapter of the file is known.
    """
    report = patient(progress)
    with open_table(file) as table, Staging(db) as staging:
        scores = ScoreTable(table=table, id_column=id_column, metric=metric)
        done = 0
        for batch in _batches(scores.read()):
            facts = [one for one in batch if not isinstance(one, ImportedScore)]
            _demand_once(table, staging.add([one for one in batch if isinstance(one, ImportedScore)], facts))
            done += len(batch)
            report(f"reading {file.name}", done, 0)
        report("comparing with the catalogue", 0, 0)
        _demand_once(table, staging.judge())
        counts = staging.counts()
        _demand_known(file, counts)
        found = Imported(counts=counts, empty=scores.empty, left=tuple(scores.left), renamed=tuple(table.renamed))
        changes = counts.scores_new + counts.scores_changed + counts.adapters_new
        if dry_run or not changes:
            return found
        settings = {"file": file.name, "id_column": id_column, "metric": metric}
        inputs = {file.name: file_sha256(file)} if file.is_file() else {}
        return replace(found, run=staging.store(settings, inputs, counts))


def _demand_once(table: Table, twice: Twice | None) -> None:
    if twice is None:
        return
    row = "row" if table.kind == "parquet" else "line"
    id, task = shortened(twice.id), shortened(twice.task)
    what = f"task {task!r} ({shortened(twice.metric)}) of {id}" if task else f"adapter {id}"
    raise table.fault(twice.again, f"{what} is already given in {row} {twice.first}")


def _demand_known(file: Path, counts: ImportCounts) -> None:
    taken = counts.scores_new + counts.scores_changed + counts.scores_same
    if taken or counts.adapters_new or counts.adapters_same or counts.adapters_elsewhere:
        return
    if not counts.unknown and not counts.elsewhere:
        raise DataError(f"{file}: no score in it", hint="every cell is empty, or there is no row below the names")
    few = ", ".join(map(shortened, (counts.unknown_ids + counts.elsewhere_ids)[:3]))
    raise NothingMatched(
        f"{file}: {counted(counts.unknown + counts.elsewhere, 'adapter')}, none in the catalogue ({few})",
        hint="run lora pool sync first, or name the column of the ids with --id-column",
    )


def _batches(items: Iterable[T]) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, _AT_ONCE)):
        yield batch
