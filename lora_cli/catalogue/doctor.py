"""Is the database whole? If not, its whole rows go into a new file, and the damaged one is kept beside it."""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_cli.catalogue.database import connect_unchecked, explained, kind_of, open_for_writing, writing
from lora_cli.catalogue.sqlite import Database
from lora_cli.errors import DataError, LoraError, NothingMatched, OutputError

_TABLES = {
    "adapters": "id",
    "aliases": "alias",
    "selections": "id",
    "selected": "",
    "runs": "id",
    "scores": "id",
    "syncs": "id",
    "spreads": "",
    "verdicts": "judged_for",
    "listings": "name",
    "sketches": "",
}
"""Every table with the column that names its rows."""
_MOST_PROBES = 100_000
_AGAIN = "move the file away and sync again: lora pool sync"


@dataclass(slots=True, kw_only=True)
class Rescue:
    """A rescue: whole rows by table, the names of lost rows by table, and the place of the damaged file.

    `lost` holds the names that an index or the numbering still tells.
    """

    kept: dict[str, int] = field(default_factory=dict)
    lost: dict[str, list[str]] = field(default_factory=dict)
    damaged: Path


def check(path: Path) -> list[str]:
    """The problems of the database at `path`, at most twenty; none if every page, index and reference is whole.

    Raises NothingMatched if there is no file, DataError or OutputError for one that cannot be opened.
    """
    if not path.exists():
        raise NothingMatched(f"{path}: no catalogue there", hint="lora pool sync makes one")
    with closing(connect_unchecked(path)) as connection:
        try:
            found = [str(row[0]) for row in connection.execute("PRAGMA integrity_check(20)") if row[0] != "ok"]
            found += [f"row {row[1]} of {row[0]} refers to a missing row" for row in _orphans(connection)]
        except sqlite3.DatabaseError as error:
            with explained(path):
                if kind_of(error) not in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                    raise
            return [str(error)]
    return found[:20]


def rescue(path: Path) -> Rescue:
    """Copy the whole rows of the database at `path` into a new file, which takes its place.

    The damaged file is kept as `PATH.damaged`. Indexes and full-text search are made anew from the rows.

    Raises:
        DataError: the file is no database of this tool, or no row of it can be read.
        OutputError: `PATH.damaged` exists, or the folder cannot be written.
    """
    damaged = path.with_name(f"{path.name}.damaged")
    if damaged.exists():
        raise OutputError(f"{damaged} exists", hint="move it away: it may hold rows of an earlier damage")
    new = path.with_name(f"{path.name}.rescued")
    result = Rescue(damaged=damaged)
    try:
        new.unlink(missing_ok=True)
        with closing(connect_unchecked(path)) as old, closing(open_for_writing(new)) as db:
            db.execute("PRAGMA foreign_keys = OFF")
            for table in _tables_of(old, path):
                _copy(old, db, table, result)
            _drop_orphans(db, result)
            _keep_home(old, db)
        if not any(result.kept.values()):
            raise DataError(f"{path}: no row can be read", hint=_AGAIN)
    except LoraError:
        new.unlink(missing_ok=True)
        raise
    for ending in ("", "-wal", "-shm"):
        if (part := path.with_name(path.name + ending)).exists():
            part.rename(damaged.with_name(damaged.name + ending))
    new.rename(path)
    return result


def _tables_of(old: sqlite3.Connection, path: Path) -> list[str]:
    try:
        there = {row[0] for row in old.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    except sqlite3.DatabaseError as error:
        raise DataError(f"{path}: nothing can be rescued ({error})", hint=_AGAIN) from error
    if "adapters" not in there:
        raise DataError(f"{path}: not a database of lora")
    return [table for table in _TABLES if table in there]


def _copy(old: sqlite3.Connection, db: Database, table: str, result: Rescue) -> None:
    """Copy the readable rows of one table, and add to `result`."""
    own = {row[1] for row in old.execute(f"PRAGMA table_info({table})")}
    columns = [row[1] for row in db.execute(f"PRAGMA table_info({table})") if row[1] in own]
    listed = ", ".join(f'"{column}"' for column in columns)
    marks = ", ".join("?" * len(columns))
    rows = _rows_of_selected(old, listed) if table == "selected" else _rows(old, table, listed)
    names = set()
    name = columns.index(_TABLES[table]) if _TABLES[table] else None
    with writing(db):
        for row in rows:
            done = db.execute(f"INSERT OR IGNORE INTO {table} ({listed}) VALUES ({marks})", row)
            result.kept[table] = result.kept.get(table, 0) + done.rowcount
            if name is not None:
                names.add(str(row[name]))
    if name is not None and (lost := _names_in_index(old, table) - names):
        result.lost[table] = sorted(lost)


def _rows(old: sqlite3.Connection, table: str, listed: str) -> Iterator[Sequence[Any]]:
    """The readable rows by their number; after a damaged part with the next row that can be read."""
    select = f"SELECT rowid, {listed} FROM {table} NOT INDEXED"
    last = 0
    while True:
        try:
            for row in old.execute(f"{select} WHERE rowid > ? ORDER BY rowid", [last]):
                last = row[0]
                yield row[1:]
            return
        except sqlite3.DatabaseError:
            row = next(_probed(old, f"{select} WHERE rowid = ?", last), None)
            if row is None:
                return
            last = row[0]
            yield row[1:]


def _probed(old: sqlite3.Connection, select: str, last: int) -> Iterator[Sequence[Any]]:
    for number in range(last + 1, last + 1 + _MOST_PROBES):
        try:
            yield from old.execute(select, [number]).fetchall()
        except sqlite3.DatabaseError:
            continue


def _rows_of_selected(old: sqlite3.Connection, listed: str) -> Iterator[Sequence[Any]]:
    """The rows of a table without row numbers: from its beginning and from its end, each up to a damaged part."""
    for order in ("selection_id, position", "selection_id DESC, position DESC"):
        try:
            yield from old.execute(f"SELECT {listed} FROM selected ORDER BY {order}")
        except sqlite3.DatabaseError:
            continue
        return


def _keep_home(old: sqlite3.Connection, db: Database) -> None:
    """Keep the folder in which the paths were written: a catalogue that was moved still has to follow its files."""
    with suppress(sqlite3.DatabaseError):
        for row in old.execute("SELECT one, folder FROM home"):
            db.execute("INSERT OR REPLACE INTO home (one, folder) VALUES (?, ?)", row)


def _names_in_index(old: sqlite3.Connection, table: str) -> set[str]:
    """The names of all rows by an index, as far as it can be read."""
    names = set()
    try:
        for row in old.execute(f"SELECT {_TABLES[table]} FROM {table}"):
            names.add(str(row[0]))
    except sqlite3.DatabaseError:
        return names
    return names


def _orphans(connection: sqlite3.Connection) -> list[Sequence[Any]]:
    return list(connection.execute("PRAGMA foreign_key_check"))


def _drop_orphans(db: Database, result: Rescue) -> None:
    """Remove rows that refer to a lost row; the score of an evaluation outlives its adapter."""
    with writing(db):
        db.execute("UPDATE scores SET adapter = NULL WHERE NOT imported AND adapter NOT IN (SELECT key FROM adapters)")
        for table, row, *_ in _orphans(db.conn):
            if row is not None:
                db.execute(f"DELETE FROM {table} WHERE rowid = ?", [row])
                result.kept[table] -= 1
        gone = db.execute("DELETE FROM selected WHERE selection_id NOT IN (SELECT id FROM selections)").rowcount
        result.kept["selected"] = result.kept.get("selected", 0) - gone
