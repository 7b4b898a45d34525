"""The scores of adapters on a task that the catalogue holds, measured here or imported."""

import json
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from lora_cli.catalogue.database import open_for_reading
from lora_cli.catalogue.rows import clean


class StoredScore(NamedTuple):
    """A score of the adapter `id` at `commit`, "" for every version.

    `log_likelihood` and `low`..`high` are None for imported scores, `run` is the run that stored the score. Of two
    scores the one with the higher `number` came later.
    """

    id: str
    commit: str
    value: float
    n: int
    low: float | None
    high: float | None
    log_likelihood: float | None
    imported: bool
    run: str
    number: int


_COLUMNS = (
    's."commit", s.value, s.n, s.low, s.high, '
    "CASE WHEN s.imported THEN NULL ELSE json_extract(s.details, '$.log_likelihood') END, s.imported, s.run_id, s.id"
)


def on_task(path: Path, task: str, metric: str) -> list[StoredScore]:
    """Every score of an adapter on a task by a metric, older ones and those of other versions too, the newest last."""
    return _found(
        path, f"SELECT a.id, {_COLUMNS} FROM scores s JOIN adapters a ON a.key = s.adapter WHERE 1", task, metric
    )


def of_base(path: Path, task: str, metric: str) -> list[StoredScore]:
    """Every score of the bare base on a task by a metric, the newest last; "" is its id."""
    return _found(
        path, f"SELECT '', {_COLUMNS} FROM scores s WHERE s.system = 'base' AND s.adapters = '[]'", task, metric
    )


class VersionScore(NamedTuple):
    """A score of one version of an adapter, measured here.

    `task` names the data, of which `sha256` is the hash. `delta` with `delta_low`..`delta_high` is the paired
    difference to `baseline`, None where there is none.
    """

    task: str
    sha256: str
    metric: str
    value: float
    low: float | None
    high: float | None
    n: int
    baseline: str
    delta: float | None
    delta_low: float | None
    delta_high: float | None


def of_version(path: Path, commit: str) -> list[VersionScore]:
    """The newest score, by task and metric, of the adapter at a commit, whatever its name was."""
    query = (
        "SELECT task, task_sha256, metric, value, low, high, n, coalesce(json_extract(details, '$.baseline'), ''), "
        "json_extract(details, '$.delta'), json_extract(details, '$.delta_low'), json_extract(details, '$.delta_high') "
        'FROM scores s WHERE "commit" = ? AND NOT imported AND value IS NOT NULL AND id = '
        '(SELECT max(id) FROM scores t WHERE t."commit" = s."commit" AND t.task = s.task AND t.metric = s.metric '
        "AND NOT t.imported AND t.value IS NOT NULL) ORDER BY task, metric"
    )
    with closing(open_for_reading(path)) as db:
        return [VersionScore(*row) for row in db.execute(query, clean([commit]))]


def _found(path: Path, query: str, task: str, metric: str) -> list[StoredScore]:
    query += " AND s.task = ? AND s.metric = ? AND s.value IS NOT NULL ORDER BY s.id"
    with closing(open_for_reading(path)) as db:
        return [StoredScore(*row)._replace(imported=bool(row[7])) for row in db.execute(query, clean([task, metric]))]


def metrics_of(path: Path, task: str) -> dict[str, int]:
    """The metrics by which the catalogue has scores on a task, each with their number, the most frequent first."""
    query = "SELECT metric, count(*) FROM adapter_scores WHERE task = ? GROUP BY 1 ORDER BY 2 DESC, 1"
    with closing(open_for_reading(path)) as db:
        return dict(db.execute(query, clean([task])).fetchall())


def tasks(path: Path) -> list[str]:
    """The tasks on which the catalogue has scores of adapters."""
    with closing(open_for_reading(path)) as db:
        return [row[0] for row in db.execute("SELECT DISTINCT task FROM adapter_scores ORDER BY 1")]


def records_of(path: Path, task: str, metric: str) -> dict[str, Mapping[str, Any]]:
    """Run → its record, of the runs that measured scores on a task by a metric."""
    query = (
        "SELECT id, record FROM runs WHERE id IN "
        "(SELECT run_id FROM scores WHERE task = ? AND metric = ? AND NOT imported)"
    )
    with closing(open_for_reading(path)) as db:
        return {id: json.loads(record) for id, record in db.execute(query, clean([task, metric]))}
