"""Free SQL for the user: one query on a connection that can only read, in a process of its own with bounds."""

import json
import os
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

from lora_cli.catalogue.database import explained, is_at_rest, open_for_reading
from lora_cli.catalogue.rows import text
from lora_cli.errors import UsageError
from lora_cli.text import size

_WORKER = "import json, sys; sys.path = json.loads(sys.argv[1]); from lora_cli.catalogue.sql_worker import main; main()"
_LESS = "add a limit or a where, or select fewer columns"


def query(
    path: Path,
    sql: str,
    *,
    seconds: float = 10.0,
    memory: int = 1_000_000_000,
    disk: int = 1_000_000_000,
    rows: int = 1_000_000,
) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Column names and rows of a query that can only read: a process of its own, no ATTACH, no extensions.

    Args:
        path: the catalogue's file.
        sql: one statement that gives rows.
        seconds: the longest time, in which no single function of SQL can hide.
        memory: the most bytes of memory.
        disk: the most bytes of a file for sorting.
        rows: the most rows.

    Raises UsageError for SQL that is wrong, tries to write or goes over a bound: these, 100 MB of rows, 10 MB in a
    cell. DataError and OutputError as `open_for_reading` does.
    """
    with closing(open_for_reading(path)) as db, tempfile.TemporaryDirectory() as folder:
        name = f"{path.absolute().as_uri()}?mode=ro"
        if not path.exists():
            empty = Path(folder, "empty.db")
            with closing(sqlite3.connect(empty)) as copy:
                db.conn.backup(copy)
            name = f"{empty.as_uri()}?mode=ro"
        elif is_at_rest(path):
            name += "&immutable=1"
        request = {"name": name, "sql": text(sql), "seconds": seconds, "memory": memory, "disk": disk, "rows": rows}
        names, found, end = _answer(request)
    if error := end.get("error"):
        with explained(path):
            raise _of_kind(error, end["kind"])
    match end.get("bound"):
        case None:
            return names, found
        case "nothing":
            raise UsageError("the query gives no rows", hint="start it with select")
        case "time":
            raise UsageError(f"SQL: stopped after {seconds:g} s", hint="add a limit or a where")
        case "memory":
            raise UsageError(f"SQL: the query needs more than {size(memory)} of memory", hint=_LESS)
        case "disk":
            raise UsageError(f"SQL: the query needs more than {size(disk)} of the disk to sort", hint=_LESS)
        case "rows":
            raise UsageError(f"the query gives more than {rows:,} rows", hint="add a limit")
    raise UsageError("the query gives more than 100 MB of rows", hint=_LESS)


def _answer(request: dict[str, Any]) -> tuple[list[str], list[tuple[Any, ...]], dict[str, Any]]:
    """Names, rows and how the query ended."""
    places = json.dumps([str(Path(place).absolute()) for place in sys.path])
    with subprocess.Popen(
        [sys.executable, "-P", "-c", _WORKER, places],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
        env={**os.environ, "PYTHONUTF8": "1"},
    ) as process:
        try:
            told, _ = process.communicate(json.dumps(request), timeout=request["seconds"])
        except subprocess.TimeoutExpired:
            return [], [], {"bound": "time"}
        finally:
            process.kill()
    # Without its last line, the process had no memory left to tell so.
    if process.returncode:
        return [], [], {"bound": "memory"}
    *lines, end = (json.loads(line, object_hook=_value) for line in told.split("\n")[:-1])
    return lines[0] if lines else [], [tuple(row) for line in lines[1:] for row in line], end


def _value(found: dict[str, Any]) -> Any:
    return bytes.fromhex(found["hex"]) if "hex" in found else found


def _of_kind(said: str, kind: int) -> Exception:
    """The error of the other process: of the file, or about the user's SQL."""
    if kind in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_CANTOPEN):
        error = sqlite3.DatabaseError(said)
        error.sqlite_errorcode = kind
        return error
    return UsageError(f"SQL: {_reason(said)}", hint=_hint(said))


def _reason(said: str) -> str:
    return "only reading is allowed here" if "not authorized" in said or "prohibited" in said else said


def _hint(error: str) -> str:
    if 'near "commit"' in error.lower():
        return 'commit is a word of SQL: write "commit" in double quotes'
    if "no such table" in error:
        return (
            "tables are adapters, adapters_fts, verdicts, selections, selected, runs, scores, syncs, aliases, spreads, "
            "sketches; views usable, adapter_scores (the newest ones), selected_adapters, run_inputs, adapter_modules"
        )
    if "no such column" in error:
        return "see `lora pool sql 'select * from adapters limit 1' --json` for the columns"
    return ""
