"""Free SQL for the user: one query on a connection that can only read."""

import sqlite3
import time
from pathlib import Path
from typing import Any

from lora_cli.catalogue.database import open_for_reading
from lora_cli.catalogue.rows import text
from lora_cli.errors import UsageError

_SECONDS = 10.0
_ROWS = 1_000_000
_CELL_BYTES = 10_000_000


def query(path: Path, sql: str) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Column names and rows of a query that can only read: a connection of its own, no ATTACH, no extensions.

    Raises UsageError for SQL that is wrong, tries to write, runs for over 10 s or gives over a million rows.
    """
    db = open_for_reading(path)
    try:
        return _guarded(db.conn, text(sql))
    finally:
        db.close()


def _guarded(connection: sqlite3.Connection, query: str) -> tuple[list[str], list[tuple[Any, ...]]]:
    connection.execute("PRAGMA query_only = ON")
    # Use virtual tables once now: they declare their columns on first use, which looks like creating a table.
    connection.execute("SELECT 1 FROM adapters_fts, json_each('[]'), json_tree('[]') LIMIT 0").fetchall()
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _CELL_BYTES)
    deadline = time.monotonic() + _SECONDS
    connection.set_progress_handler(lambda: time.monotonic() > deadline, 10_000)
    connection.set_authorizer(_only_reading)
    try:
        cursor = connection.execute(query)
        if cursor.description is None:
            raise UsageError("the query gives no rows", hint="start it with select")
        rows = cursor.fetchmany(_ROWS + 1)
    except (sqlite3.Error, sqlite3.Warning) as error:
        raise UsageError(f"SQL: {_reason(error)}", hint=_hint(error, query)) from error
    if len(rows) > _ROWS:
        raise UsageError(f"the query gives more than {_ROWS:,} rows", hint="add a limit")
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


def _reason(error: Exception) -> str:
    said = str(error)
    if said == "interrupted":
        return f"stopped after {_SECONDS:.0f} s"
    if "not authorized" in said or "prohibited" in said:
        return "only reading is allowed here"
    return said


def _hint(error: Exception, query: str) -> str:
    if 'near "commit"' in str(error) or 'near "COMMIT"' in str(error):
        return 'commit is a word of SQL: write "commit" in double quotes'
    if "no such table" in str(error):
        return "tables are adapters, adapters_fts, selections, selected, runs, scores, syncs, aliases"
    if "no such column" in str(error):
        return "see `lora pool sql 'select * from adapters limit 1' --json` for the columns"
    return ""
