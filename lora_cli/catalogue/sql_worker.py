"""The process in which a user's query runs: its memory, time and disk are bounded, and it can be ended at any point.

One JSON object comes in, JSON lines go out: the names of the columns, the rows, and how it ended. No other room is
imported, so that the process starts in some hundredths of a second.
"""

import json
import resource
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import Any

_MOST_BYTES = 100_000_000
_MOST_BYTES_OF_A_CELL = 10_000_000
_ROWS_OF_A_LINE = 50


def main() -> None:
    """Answer the request on stdin."""
    request = json.load(sys.stdin)
    limits = (
        (resource.RLIMIT_AS, request["memory"]),
        (resource.RLIMIT_CPU, int(request["seconds"]) + 1),
        (resource.RLIMIT_FSIZE, request["disk"]),
    )
    for limit, most in limits:
        # Not every system has all of them. The time ends the process in any case.
        with suppress(OSError, ValueError):
            resource.setrlimit(limit, (most, most))
    try:
        for line in _lines(request["name"], request["sql"], request["rows"]):
            sys.stdout.write(line)
        end: dict[str, Any] = {}
    except MemoryError:
        end = {"bound": "memory"}
    except (sqlite3.Error, sqlite3.Warning) as error:
        kind = getattr(error, "sqlite_errorcode", 0) & 0xFF
        full = kind in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)
        end = {"bound": "disk"} if full else {"error": str(error), "kind": kind}
    except _TooMuch as bound:
        end = {"bound": str(bound)}
    sys.stdout.write(json.dumps(end) + "\n")


class _TooMuch(Exception):
    """A bound on the result."""


def _lines(name: str, sql: str, most_rows: int) -> Iterator[str]:
    """The names, then the rows of the query, some on each line."""
    with closing(sqlite3.connect(name, timeout=30, uri=True)) as connection:
        connection.execute("PRAGMA query_only = ON")
        # Use virtual tables once now: they declare their columns on first use, which looks like creating a table.
        connection.execute("SELECT 1 FROM adapters_fts, json_each('[]'), json_tree('[]') LIMIT 0").fetchall()
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MOST_BYTES_OF_A_CELL)
        connection.set_authorizer(_only_reading)
        cursor = connection.execute(sql)
        if cursor.description is None:
            raise _TooMuch("nothing")
        yield json.dumps([column[0] for column in cursor.description]) + "\n"
        encode = json.JSONEncoder(ensure_ascii=False, default=lambda data: {"hex": data.hex()}).encode
        count = size = 0
        while rows := cursor.fetchmany(_ROWS_OF_A_LINE):
            line = encode(rows) + "\n"
            count, size = count + len(rows), size + len(line)
            if count > most_rows:
                raise _TooMuch("rows")
            if size > _MOST_BYTES:
                raise _TooMuch("size")
            yield line


def _only_reading(action: int, first: str | None, second: str | None, *_: str | None) -> int:
    if action in (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE):
        return sqlite3.SQLITE_OK
    if action == sqlite3.SQLITE_FUNCTION and second != "load_extension":
        return sqlite3.SQLITE_OK
    # The full-text index issues this itself when it is searched.
    if action == sqlite3.SQLITE_PRAGMA and first == "data_version":
        return sqlite3.SQLITE_OK
    return sqlite3.SQLITE_DENY
