"""The catalogued adapters, and the selections made from them: one SQLite file, safe to kill and to share."""

import json
import re
import sqlite3
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

from lora_cli.catalogue.database import open_for_reading, open_for_writing, writing
from lora_cli.catalogue.sqlite import Database
from lora_cli.catalogue.where import conditions, ordering
from lora_cli.errors import NothingMatched, UsageError
from lora_cli.records import Adapter, AdapterRef, AdapterRow, Candidate
from lora_cli.settings import folder_of


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


_WRITTEN = (*(field.name for field in fields(Adapter)), "rank_total", "hub_id", "seen_at")
_UPSERT = (
    f"INSERT INTO adapters ({_quoted(_WRITTEN)}) VALUES ({', '.join('?' * len(_WRITTEN))}) "
    "ON CONFLICT (id) DO UPDATE SET " + ", ".join(f'"{name}" = excluded."{name}"' for name in _WRITTEN if name != "id")
)
R = TypeVar("R", Adapter, AdapterRow)
_REVISION = re.compile(r"@([0-9a-f]{4,40})(?=$|:)")
_SQL_SECONDS = 10.0
_SQL_ROWS = 1_000_000
_SQL_CELL_BYTES = 10_000_000
_BATCH = 400  # ids per statement, below SQLite's limit on parameters


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Adapters chosen together: pinned references in order, with the score of each if the method gave one."""

    id: int
    name: str
    created: str
    method: str
    settings: Mapping[str, Any]
    refs: tuple[AdapterRef, ...]
    scores: tuple[float | None, ...]


class Catalogue:
    """The catalogue at `path`. Nothing is created before the first write; reading cannot change the file.

    One object may be used by several threads, and the file by several processes: every write is one transaction.
    Methods raise DataError for a file that is no catalogue and OutputError for one that cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._reader: Database | None = None
        self._writer: Database | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        with self._lock:
            for db in (self._reader, self._writer):
                if db is not None:
                    db.close()
            self._reader = self._writer = None

    def add(self, adapters: Iterable[Adapter], hub_ids: Mapping[str, str] | None = None) -> None:
        """Store adapters by id, in one transaction; an existing row is replaced.

        `hub_ids` maps an id to the Hub's own stable id of the repository: a row of that repository is renamed.
        """
        seen = datetime.now(UTC).isoformat(timespec="seconds")
        with self._lock, writing(self._write()) as db:
            for adapter in adapters:
                hub_id = (hub_ids or {}).get(adapter.id, "")
                if hub_id:
                    self._follow_rename(db, adapter, hub_id)
                db.execute(_UPSERT, [*_row(adapter), sum(adapter.ranks.values()), hub_id, seen])

    def refresh(self, popularity: Mapping[str, tuple[int, int]]) -> None:
        """Set downloads and likes, which change from day to day even if the adapter does not."""
        with self._lock, writing(self._write()) as db:
            for id, (downloads, likes) in popularity.items():
                db.execute("UPDATE adapters SET downloads = ?, likes = ? WHERE id = ?", [downloads, likes, id])

    def learn(self, adapter: Adapter) -> None:
        """Store the facts from reading the weights; ignored if the row is at another commit by now."""
        with self._lock, writing(self._write()) as db:
            db.execute(
                "UPDATE adapters SET sha256 = ?, norm = ?, bytes = ?, status = ?, reason = ? "
                'WHERE id = ? AND "commit" = ?',
                [
                    adapter.sha256,
                    adapter.norm,
                    adapter.bytes,
                    adapter.status,
                    adapter.reason,
                    adapter.id,
                    adapter.commit,
                ],
            )

    def mark(self, ids: Iterable[str], status: str, reason: str) -> None:
        """Give rows another status, with its reason."""
        with self._lock, writing(self._write()) as db:
            for id in ids:
                db.execute("UPDATE adapters SET status = ?, reason = ? WHERE id = ?", [status, reason, id])

    def known(self, ids: Sequence[str] | None = None) -> dict[str, Known]:
        """The stored version and status of these ids (all ids by default); ids without a row are left out."""
        columns = "SELECT id, " + ", ".join(f'"{name}"' for name in Known._fields) + " FROM adapters"
        with self._lock:
            db = self._read()
            if ids is None:
                rows = db.execute(columns).fetchall()
            else:
                rows = []
                for start in range(0, len(ids), _BATCH):
                    batch = [_text(id) for id in ids[start : start + _BATCH]]
                    rows += db.execute(f"{columns} WHERE id IN ({', '.join('?' * len(batch))})", batch).fetchall()
        return {id: Known(*values) for id, *values in rows}

    def get(self, id: str) -> Adapter:
        """The adapter with this id. NothingMatched, with similar ids, if there is none."""
        with self._lock:
            rows = self._rows(Adapter, "WHERE id = ?", [id])
        if rows:
            return rows[0]
        near = self.suggest(id)
        hint = f"did you mean {' or '.join(near)}?" if near else "see `lora pool list`, or run `lora pool sync`"
        raise NothingMatched(f"{id}: not in the catalogue", hint=hint)

    def named(self, text: str) -> Adapter:
        """The row for the user's text: an id (with `@commit` only that version), or a folder.

        Raises:
            NothingMatched: no such row, with similar ids; or the row is at another commit.
        """
        if text.startswith((".", "/", "~")) and (folder := folder_of(text)) is not None:
            found = self.at(folder)
            if found is None:
                raise NothingMatched(
                    f"{text}: not in the catalogue", hint=f"lora pool verify {text} checks a folder without a sync"
                )
            return found
        wanted = _REVISION.search(text)
        row = self.get(_REVISION.sub("", text))
        if wanted and not row.commit.startswith(wanted[1]):
            raise NothingMatched(
                f"{row.id} is at commit {row.commit[:12]} in the catalogue; commit {wanted[1]} is not available here",
                hint=f"drop @{wanted[1]} to use it as it is, or run lora select again",
            )
        return row

    def at(self, folder: Path) -> Adapter | None:
        """The adapter in `folder`, None if it is not in the catalogue."""
        with self._lock:
            rows = self._rows(Adapter, "WHERE source = 'folder' AND repo = ?", [str(folder.resolve())])
        return rows[0] if rows else None

    def provenance(self, id: str) -> dict[str, Any]:
        """The time of a row's last write, the Hub's own id of its repository, and the selections that hold it."""
        with self._lock:
            db = self._read()
            found = db.execute("SELECT hub_id, seen_at FROM adapters WHERE id = ?", [id]).fetchone() or ("", "")
            selections = db.execute(
                "SELECT s.id, s.name FROM selected JOIN selections s ON s.id = selection_id WHERE adapter_id = ? "
                "ORDER BY s.id DESC LIMIT 20",
                [id],
            )
            names = [name or f"#{number}" for number, name in selections]
        return {"hub_id": found[0], "stored_at": found[1], "selections": names}

    def suggest(self, id: str, count: int = 3) -> list[str]:
        """Ids similar to `id`, the likeliest first: of the same name, or spelled alike."""
        from rapidfuzz import fuzz, process

        wanted = id.lower()
        with self._lock:
            ids = [row[0] for row in self._read().execute("SELECT id FROM adapters ORDER BY id")]
        lowered = [known.lower() for known in ids]
        name = "/" + wanted.rpartition("/")[2]
        same = [known for known, low in zip(ids, lowered, strict=True) if low.endswith(name)]
        alike = process.extract(wanted, lowered, scorer=fuzz.ratio, score_cutoff=70, limit=count)
        return list(dict.fromkeys([*same, *(ids[place] for _, _, place in alike)]))[:count]

    def ids_from(self, start: str, limit: int) -> list[str]:
        """The first ids with the prefix `start`, in alphabetical order."""
        with self._lock:
            rows = self._read().execute(
                "SELECT id FROM adapters WHERE id >= ? AND substr(id, 1, ?) = ? ORDER BY id LIMIT ?",
                [*_clean([start]), len(start), *_clean([start]), limit],
            )
            return [row[0] for row in rows]

    def values_of(self, column: str, start: str, limit: int) -> list[str]:
        """The values of a column with the prefix `start`, the most frequent first."""
        name = _quoted([column])
        with self._lock:
            rows = self._read().execute(
                f"SELECT {name} FROM adapters WHERE {name} != '' AND substr({name}, 1, ?) = ? "
                "GROUP BY 1 ORDER BY count(*) DESC, 1 LIMIT ?",
                [len(start), *_clean([start]), limit],
            )
            return [str(row[0]) for row in rows]

    def remove(self, ids: Sequence[str]) -> None:
        """Delete the rows of adapters, also from selections; their files stay."""
        with self._lock, writing(self._write()) as db:
            for id in ids:
                db.execute("DELETE FROM selected WHERE adapter_id = ?", [id])
                db.execute("DELETE FROM adapters WHERE id = ?", [id])

    def selections(self) -> list[dict[str, Any]]:
        """Every selection, the newest first: number, name, time, method and number of adapters."""
        with self._lock:
            return list(
                self._read().query(
                    "SELECT id, name, created, method, "
                    "(SELECT count(*) FROM selected WHERE selection_id = id) AS adapters "
                    "FROM selections ORDER BY id DESC"
                )
            )

    def drop_selections(self, name: str) -> int:
        """Delete the selections of this name or number; returns the number deleted."""
        with self._lock, writing(self._write()) as db:
            return int(db.execute("DELETE FROM selections WHERE name = ? OR id = ?", [*_clean([name]), name]).rowcount)

    def selection_names(self) -> list[str]:
        """The names of selections, the newest first."""
        with self._lock:
            rows = self._read().execute(
                "SELECT name FROM selections WHERE name != '' GROUP BY name ORDER BY max(id) DESC"
            )
            return [row[0] for row in rows]

    def find(
        self, where: Sequence[str] = (), *, sort: str = "id", limit: int | None = None, status: str | None = None
    ) -> list[AdapterRow]:
        """Adapters for which every condition of `where` holds (see `where`), and the status if one is given."""
        test, values = _tested(where, status)
        # Choose rows by their keys first, so that only the requested rows are read in full.
        keys = f"SELECT key FROM adapters WHERE {test} ORDER BY {ordering(sort)} LIMIT ?"
        with self._lock:
            return self._rows(
                AdapterRow,
                f"WHERE key IN ({keys}) ORDER BY {ordering(sort)}",
                [*values, -1 if limit is None else limit],
            )

    def rows(self, ids: Sequence[str]) -> list[AdapterRow]:
        """The adapters with these ids, in this order; those that are not in the catalogue are left out."""
        found: dict[str, AdapterRow] = {}
        with self._lock:
            for start in range(0, len(ids), _BATCH):
                batch = ids[start : start + _BATCH]
                for row in self._rows(AdapterRow, f"WHERE id IN ({', '.join('?' * len(batch))})", batch):
                    found[row.id] = row
        return [found[id] for id in ids if id in found]

    def candidates(self, where: Sequence[str] = (), *, base: str | None = None) -> list[Candidate]:
        """The usable adapters for which every condition of `where` holds, of `base` if given; by id."""
        test, values = _tested(where, "ok")
        if base is not None:
            test, values = f"{test} AND base = ?", [*values, base]
        with self._lock:
            rows = self._read().execute(
                f"SELECT {_quoted(Candidate._fields)} FROM adapters WHERE {test} ORDER BY base, id", _clean(values)
            )
            return list(map(Candidate._make, rows))

    def search(self, text: str, *, limit: int = 50) -> list[AdapterRow]:
        """Adapters whose id, author, modules or card hold every word of `text` (or a word that starts so), best first.

        Punctuation in `text` only separates words: there is no query language.
        """
        words = re.findall(r"\w+", text.replace("_", " "))
        if not words:
            raise UsageError(f"nothing to search for in {text!r}", hint="give a word or two")
        query = " ".join(f'"{word}"*' for word in words[:20])
        joined = (
            "JOIN (SELECT rowid AS found, bm25(adapters_fts, 8, 4, 2, 1) AS place "
            "FROM adapters_fts WHERE adapters_fts MATCH ?) ON key = found ORDER BY place, id LIMIT ?"
        )
        with self._lock:
            return self._rows(AdapterRow, joined, [query, limit])

    def stats(self) -> dict[str, Any]:
        """Counts of the whole catalogue: by status, base, rank, licence, author, data type and reason."""
        with self._lock:
            db = self._read()
            [totals] = db.query(
                "SELECT count(*) AS adapters, coalesce(sum(bytes), 0) AS bytes, "
                "count(DISTINCT nullif(author, '')) AS authors, coalesce(sum(status = 'ok'), 0) AS usable FROM adapters"
            )
            groups = {
                name: {
                    "" if value is None else str(value): count
                    for value, count in db.execute(
                        f"SELECT {column}, count(*) FROM adapters {test} GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT ?", [limit]
                    )
                }
                for name, column, test, limit in (
                    ("by_status", "status", "", 10),
                    ("by_base", "base", "", 10),
                    ("by_rank", "rank", "WHERE status = 'ok'", 20),
                    ("by_licence", "licence", "", 10),
                    ("by_author", "author", "", 10),
                    ("by_dtype", "dtype", "WHERE status = 'ok'", 10),
                    ("by_reason", "reason", "WHERE reason != ''", 10),
                )
            }
            last = db.execute("SELECT max(ended) FROM syncs").fetchone()[0]
        return {**totals, **groups, "last_sync": last}

    def ids_of(self, *, source: str, base: str = "") -> list[str]:
        """Ids of rows that are not gone, from one source or of one base: a sync checks these for deletions."""
        test, values = "source = ? AND status != 'gone'", [source]
        if base:
            test, values = f"{test} AND base = ?", [*values, base]
        with self._lock:
            return [row[0] for row in self._read().execute(f"SELECT id FROM adapters WHERE {test} ORDER BY id", values)]

    def remember_sync(self, started: str, source: str, base: str, report: Mapping[str, Any]) -> None:
        """Store the figures of one sync."""
        with self._lock, writing(self._write()) as db:
            db.execute(
                "INSERT INTO syncs (started, ended, source, base, report) VALUES (?, ?, ?, ?, ?)",
                [started, datetime.now(UTC).isoformat(timespec="seconds"), source, base, json.dumps(dict(report))],
            )

    def remember_selection(
        self,
        name: str,
        chosen: Sequence[tuple[AdapterRow | AdapterRef, float | None]],
        method: str,
        settings: Mapping[str, Any],
    ) -> int:
        """Store a selection, in order, and return its number."""
        created = datetime.now(UTC).isoformat(timespec="microseconds")
        with self._lock, writing(self._write()) as db:
            cursor = db.execute(
                "INSERT INTO selections (name, created, method, settings) VALUES (?, ?, ?, ?)",
                [name, created, method, json.dumps(dict(settings))],
            )
            number = int(cursor.lastrowid or 0)
            for position, (adapter, score) in enumerate(chosen):
                db.execute(
                    "INSERT INTO selected VALUES (?, ?, ?, ?, ?)", [number, position, adapter.id, adapter.commit, score]
                )
        return number

    def last_selection(self, name: str | None = None) -> Selection | None:
        """The newest selection, or the newest of this name; None if there is none.

        Its adapters stay pinned to their commits. NothingMatched if one of them is no longer in the catalogue.
        """
        test, values = ("WHERE name = ?", [name]) if name is not None else ("", [])
        with self._lock:
            db = self._read()
            found = list(db.query(f"SELECT * FROM selections {test} ORDER BY id DESC LIMIT 1", values))
            if not found:
                return None
            [row] = found
            chosen = db.execute(
                'SELECT adapter_id, "commit", score FROM selected WHERE selection_id = ? ORDER BY position', [row["id"]]
            ).fetchall()
            refs = tuple(replace(self.get(id).ref, commit=commit) for id, commit, _ in chosen)
        return Selection(
            id=row["id"],
            name=row["name"],
            created=row["created"],
            method=row["method"],
            settings=json.loads(row["settings"]),
            refs=refs,
            scores=tuple(score for _, _, score in chosen),
        )

    def aliases(self) -> dict[str, str]:
        """Every remembered other name of a base model, with its base."""
        with self._lock:
            return dict(self._read().execute("SELECT alias, base FROM aliases ORDER BY alias").fetchall())

    def remember_aliases(self, base: str, aliases: Iterable[str]) -> None:
        """Replace the stored other names of a base model."""
        with self._lock, writing(self._write()) as db:
            db.execute("DELETE FROM aliases WHERE base = ?", [base])
            for alias in aliases:
                db.execute("INSERT OR REPLACE INTO aliases (alias, base) VALUES (?, ?)", [alias, base])

    def sql(self, query: str) -> tuple[list[str], list[tuple[Any, ...]]]:
        """Column names and rows of a query that can only read: a connection of its own, no ATTACH, no extensions.

        Raises UsageError for SQL that is wrong, tries to write, runs for over 10 s or gives over a million
        rows.
        """
        db = open_for_reading(self.path)
        try:
            return _guarded_query(db.conn, _text(query))
        finally:
            db.close()

    def _read(self) -> Database:
        if self._writer is not None:
            return self._writer
        if self._reader is None:
            self._reader = open_for_reading(self.path)
        return self._reader

    def _write(self) -> Database:
        if self._writer is None:
            self._writer = open_for_writing(self.path)
            if self._reader is not None:
                self._reader.close()
                self._reader = None
        return self._writer

    def _rows(self, kind: type[R], rest: str, values: Sequence[Any]) -> list[R]:
        """Rows as records of `kind`, of a query that goes on with `rest`."""
        names = [field.name for field in fields(kind)]
        rows = self._read().execute(f"SELECT {_quoted(names)} FROM adapters {rest}", _clean(values))
        return [kind(**_parsed(dict(zip(names, row, strict=True)))) for row in rows]

    @staticmethod
    def _follow_rename(db: Database, adapter: Adapter, hub_id: str) -> None:
        same = "hub_id = ? AND subfolder = ? AND id != ?"
        which = [hub_id, adapter.subfolder, adapter.id]
        db.execute(
            f"UPDATE selected SET adapter_id = ? WHERE adapter_id IN (SELECT id FROM adapters WHERE {same})",
            [adapter.id, *which],
        )
        db.execute(f"UPDATE OR REPLACE adapters SET id = ? WHERE {same}", [adapter.id, *which])


def _text(value: str) -> str:
    """`value` with lone surrogates escaped: arguments and file names may hold them, and SQLite takes only Unicode."""
    return value.encode("utf-8", "backslashreplace").decode()


def _clean(values: Iterable[Any]) -> list[Any]:
    return [_text(value) if isinstance(value, str) else value for value in values]


def _tested(where: Sequence[str], status: str | None) -> tuple[str, list[Any]]:
    """The SQL of conditions and of a status, and its values."""
    test, values = conditions(where)
    return (test, [*values]) if status is None else (f"({test}) AND status = ?", [*values, status])


def _row(adapter: Adapter) -> list[Any]:
    """The values of an adapter's fields as SQLite stores them."""
    values = []
    for field in fields(Adapter):
        value = getattr(adapter, field.name)
        if field.name == "ranks":
            value = json.dumps(dict(value))
        elif field.name == "target_modules":
            value = json.dumps(list(value))
        elif isinstance(value, bool):
            value = int(value)
        elif isinstance(value, str):
            value = _text(value)
        values.append(value)
    return values


def _parsed(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a record from what SQLite stored of them."""
    if "ranks" in values:
        values["ranks"] = json.loads(values["ranks"])
    if "target_modules" in values:
        values["target_modules"] = tuple(json.loads(values["target_modules"]))
    if "rslora" in values:
        values["rslora"] = bool(values["rslora"])
    return values


def _guarded_query(connection: sqlite3.Connection, query: str) -> tuple[list[str], list[tuple[Any, ...]]]:
    connection.execute("PRAGMA query_only = ON")
    # Use virtual tables once now: they declare their columns on first use, which looks like creating a table.
    connection.execute("SELECT 1 FROM adapters_fts, json_each('[]'), json_tree('[]') LIMIT 0").fetchall()
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _SQL_CELL_BYTES)
    deadline = time.monotonic() + _SQL_SECONDS
    connection.set_progress_handler(lambda: time.monotonic() > deadline, 10_000)
    connection.set_authorizer(_only_reading)
    try:
        cursor = connection.execute(query)
        if cursor.description is None:
            raise UsageError("the query gives no rows", hint="start it with select")
        rows = cursor.fetchmany(_SQL_ROWS + 1)
    except (sqlite3.Error, sqlite3.Warning) as error:
        raise UsageError(f"SQL: {_sql_reason(error)}", hint=_sql_hint(error, query)) from error
    if len(rows) > _SQL_ROWS:
        raise UsageError(f"the query gives more than {_SQL_ROWS:,} rows", hint="add a limit")
    return [column[0] for column in cursor.description], rows


def _only_reading(action: int, first: str | None, second: str | None, *_: str | None) -> int:
    if action in (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE):
        return sqlite3.SQLITE_OK
    if action == sqlite3.SQLITE_FUNCTION and second != "load_extension":
        return sqlite3.SQLITE_OK
    # The full-text index issues this itself when it is searched.
    if action == sqlite3.SQLITE_PRAGMA and first == "data_version":
        return sqlite3.SQLITE_OK
    return sqlite3.SQLITE_DENY


def _sql_reason(error: Exception) -> str:
    text = str(error)
    if text == "interrupted":
        return f"stopped after {_SQL_SECONDS:.0f} s"
    if "not authorized" in text or "prohibited" in text:
        return "only reading is allowed here"
    return text


def _sql_hint(error: Exception, query: str) -> str:
    if 'near "commit"' in str(error) or 'near "COMMIT"' in str(error):
        return 'commit is a word of SQL: write "commit" in double quotes'
    if "no such table" in str(error):
        return "tables are adapters, adapters_fts, selections, selected, runs, scores, syncs, aliases"
    if "no such column" in str(error):
        return "see `lora pool sql 'select * from adapters limit 1' --json` for the columns"
    return ""
