"""Rows of a file on their way into the catalogue: all of them, in one transaction, or none."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from lora_cli.catalogue.database import open_for_reading, open_for_writing, writing
from lora_cli.catalogue.rows import UPSERT, WRITTEN, clean, quoted, row_of, text
from lora_cli.catalogue.runs import new_run
from lora_cli.names import ids_and_commits
from lora_cli.records import Adapter, ImportCounts, ImportedScore

_AT_ONCE = 2_000
_NAMED = 3
_TABLES = (
    """
    CREATE TEMP TABLE staged (
        raw TEXT NOT NULL, task TEXT NOT NULL, metric TEXT NOT NULL, value REAL NOT NULL, n INTEGER NOT NULL,
        line INTEGER NOT NULL
    )
    """,
    f"CREATE TEMP TABLE staged_adapters AS SELECT {quoted(WRITTEN)}, 0 AS line FROM main.adapters WHERE 0",
    "CREATE UNIQUE INDEX temp.staged_ids ON staged_adapters (id)",
    """
    CREATE TEMP TABLE meant (
        raw TEXT PRIMARY KEY, id TEXT NOT NULL, "commit" TEXT NOT NULL, state TEXT NOT NULL, key INTEGER
    ) WITHOUT ROWID
    """,
)
# Each staged score with what the catalogue holds of it.
_JUDGED = """
    CREATE TEMP TABLE judged AS
    SELECT m.id, m."commit", m.state, s.task, s.metric, s.value, s.n, s.line,
        CASE WHEN m.state != 'known' THEN m.state WHEN old.value IS NULL THEN 'new'
             WHEN old.value = s.value AND old.n = s.n THEN 'same' ELSE 'changed' END AS verdict
    FROM staged s JOIN meant m ON m.raw = s.raw
    LEFT JOIN main.scores old ON old.id = (
        SELECT max(t.id) FROM main.scores t JOIN main.adapters a ON a.key = t.adapter
        WHERE t.adapter = m.key AND t.task = s.task AND t.metric = s.metric AND t."commit" IN ('', a."commit")
    )
"""
_STORE = """
    INSERT OR REPLACE INTO scores (run_id, system, adapter, "commit", task, metric, value, n, imported)
    SELECT ?, '', key, ?, ?, ?, ?, ?, 1 FROM adapters WHERE id = ?
"""

_OLD = "LEFT JOIN main.adapters old ON old.id = s.id"
_OF_ADAPTER = """
    CASE WHEN old.key IS NULL THEN 'new' WHEN old."commit" = s."commit" THEN 'same' ELSE 'elsewhere' END
"""
# What the catalogue knows itself is newer than a file.
_ADD = UPSERT.partition("ON CONFLICT")[0] + "ON CONFLICT (id) DO NOTHING"


class Twice(NamedTuple):
    """A score or an adapter that a file has twice; `task` and `metric` are "" for an adapter."""

    id: str
    task: str
    metric: str
    first: int
    again: int


class Staging:
    """The rows of a file, in temporary tables on the disk: the catalogue is only read until `store`.

    Methods raise DataError for a file that is no catalogue, OutputError for one that cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._db = open_for_reading(path)
        for statement in _TABLES:
            self._db.execute(statement)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._db.close()

    def add(self, scores: Iterable[ImportedScore], adapters: Iterable[tuple[Adapter, int]]) -> Twice | None:
        """Stage scores, and adapters with their lines. An adapter that was staged before is returned."""
        self._db.execute("BEGIN")
        self._db.conn.executemany("INSERT INTO staged VALUES (?, ?, ?, ?, ?, ?)", map(clean, scores))
        seen = datetime.now(UTC).isoformat(timespec="seconds")
        insert = f"INSERT OR IGNORE INTO staged_adapters VALUES ({', '.join('?' * (len(WRITTEN) + 1))})"
        for adapter, line in adapters:
            values = [*row_of(adapter), sum(adapter.ranks.values()), "", seen, text(adapter.base)]
            if self._db.execute(insert, [*values, line]).rowcount == 0:
                [first] = self._db.execute("SELECT line FROM staged_adapters WHERE id = ?", values[:1]).fetchone()
                return Twice(adapter.id, "", "", first, line)
        self._db.execute("COMMIT")
        return None

    def judge(self) -> Twice | None:
        """Compare all staged rows with the catalogue. A score that the file has twice is returned."""
        self._db.execute("BEGIN")
        names = self._db.execute("SELECT DISTINCT raw FROM staged")
        while batch := names.fetchmany(_AT_ONCE):
            meant = [(raw, *self._meant(raw)) for (raw,) in batch]
            self._db.conn.executemany("INSERT INTO meant VALUES (?, ?, ?, ?, ?)", meant)
        twice = self._db.execute(
            "SELECT m.id, task, metric, min(line), max(line) FROM staged s JOIN meant m ON m.raw = s.raw "
            "GROUP BY 1, 2, 3 HAVING count(*) > 1 ORDER BY 5 LIMIT 1"
        ).fetchone()
        if twice is None:
            self._db.execute(_JUDGED)
        # A read transaction would keep a writer out, where the database has a rollback journal.
        self._db.execute("COMMIT")
        return Twice(*twice) if twice else None

    def counts(self) -> ImportCounts:
        """What the staged rows are, beside the catalogue. After `judge`."""
        scores = dict(self._db.execute("SELECT verdict, count(*) FROM judged GROUP BY 1").fetchall())
        adapters = dict(self._db.execute(f"SELECT {_OF_ADAPTER}, count(*) FROM staged_adapters s {_OLD} GROUP BY 1"))
        return ImportCounts(
            scores_new=scores.get("new", 0),
            scores_changed=scores.get("changed", 0),
            scores_same=scores.get("same", 0),
            scores_unknown=scores.get("unknown", 0),
            scores_elsewhere=scores.get("elsewhere", 0),
            adapters_new=adapters.get("new", 0),
            adapters_same=adapters.get("same", 0),
            adapters_elsewhere=adapters.get("elsewhere", 0),
            unknown=self._one("SELECT count(*) FROM meant WHERE state = ?", "unknown"),
            elsewhere=self._one("SELECT count(*) FROM meant WHERE state = ?", "elsewhere"),
            unknown_ids=self._first("unknown"),
            elsewhere_ids=self._first("elsewhere"),
            scored=self._one("SELECT count(DISTINCT id) FROM judged WHERE state = ?", "known"),
            tasks=self._one("SELECT count(DISTINCT task) FROM judged WHERE state = ?", "known"),
        )

    def store(self, settings: Mapping[str, Any], inputs: Mapping[str, str], counts: ImportCounts) -> str:
        """Write what is new and what has changed, with a run that tells where it comes from; returns its id."""
        now = datetime.now(UTC)
        run = new_run(now, "import", settings, inputs)
        run.results |= {name: value for name, value in asdict(counts).items() if isinstance(value, int) and value}
        ended = ["done", now.isoformat(), now.isoformat(), json.dumps(run.record())]
        with closing(open_for_writing(self._path)) as connection, writing(connection) as db:
            for batch in self._batches(f"SELECT {quoted(WRITTEN)} FROM staged_adapters"):
                db.conn.executemany(_ADD, batch)
            db.execute(
                "INSERT INTO runs (id, command, status, started, ended, record) VALUES (?, 'import', ?, ?, ?, ?)",
                [run.id, *ended],
            )
            changed = """
                SELECT "commit", task, metric, value, n, id FROM judged
                WHERE verdict IN ('new', 'changed') ORDER BY line
            """
            for batch in self._batches(changed):
                db.conn.executemany(_STORE, [(run.id, *row) for row in batch])
        return run.id

    def _batches(self, query: str) -> Iterator[list[tuple[Any, ...]]]:
        rows = self._db.execute(query)
        while batch := rows.fetchmany(_AT_ONCE):
            yield batch

    def _meant(self, raw: str) -> tuple[str, str, str, int | None]:
        """The adapter that a name means: id, commit if the name tells it, "known" or why not, key in the catalogue."""
        state = "unknown"
        for id, commit in ids_and_commits(raw):
            row = self._db.execute('SELECT "commit", key FROM main.adapters WHERE id = ?', [id]).fetchone()
            row = row or self._db.execute('SELECT "commit", NULL FROM staged_adapters WHERE id = ?', [id]).fetchone()
            if row is not None and row[0].startswith(commit):
                return id, row[0] if commit else "", "known", row[1]
            if row is not None:
                state = "elsewhere"
        return raw, "", state, None

    def _first(self, state: str) -> tuple[str, ...]:
        """Some names in the file of this state."""
        rows = self._db.execute(f"SELECT raw FROM meant WHERE state = ? ORDER BY raw LIMIT {_NAMED}", [state])
        return tuple(raw for (raw,) in rows.fetchall())

    def _one(self, query: str, *values: str) -> int:
        return int(self._db.execute(query, [*values]).fetchone()[0])
