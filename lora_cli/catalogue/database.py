"""The one SQLite file: how it is opened, brought up to date and written. Its tables are made in `migrations`."""

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

from lora_cli.catalogue import migrations as schema
from lora_cli.catalogue.sqlite import Database
from lora_cli.errors import DataError, OutputError

BUSY_SECONDS = 30.0
_SQLITE_MAGIC = b"SQLite format 3\x00"


def open_for_writing(path: Path) -> Database:
    """The database at `path`, created or brought up to date first (an older one is copied beside itself before that).

    Statements commit one by one; use `writing(db)` to group them. Raises OutputError where the file cannot be written,
    DataError where it is not this tool's database or comes from a newer version.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path.parent}: cannot be created ({error.strerror})", hint=_ELSEWHERE) from error
    _refuse_other_files(path)
    with _explained(path):
        db = _connect(str(path))
    try:
        with _explained(path):
            _use_wal(db)
            if _pending(db, path):
                _migrate(db, path)
            db.execute("PRAGMA foreign_keys = ON")
    except BaseException:
        db.close()
        raise
    return db


def open_for_reading(path: Path) -> Database:
    """The database at `path`, which this connection cannot change; an empty one in memory where there is no file yet.

    Raises the same errors as `open_for_writing`.
    """
    if not _refuse_other_files(path):
        db = _connect(":memory:")
        schema.migrations().apply(db)
        return db
    with _explained(path):
        db = _connect_read_only(path)
        try:
            behind = _pending(db, path)
        except BaseException:
            db.close()
            raise
        if not behind:
            return db
        db.close()
        open_for_writing(path).close()
        return _connect_read_only(path)


@contextlib.contextmanager
def writing(db: Database) -> Iterator[Database]:
    """One transaction that takes the write lock at the start, so that waiting for the lock cannot fail halfway.

    Raises OutputError where the disk is full, or another process holds the lock for longer than 30 s.
    """
    with _explained(None):
        db.execute("BEGIN IMMEDIATE")
        try:
            yield db
        except BaseException:
            db.rollback()
            raise
        db.commit()


def _connect(name: str, *, uri: bool = False) -> Database:
    # isolation_level None leaves every BEGIN to us. Threads share a connection under a lock of the catalogue's own.
    connection = sqlite3.connect(name, timeout=BUSY_SECONDS, isolation_level=None, uri=uri, check_same_thread=False)
    try:
        return Database(connection, execute_plugins=False)
    except BaseException:
        connection.close()
        raise


def _connect_read_only(path: Path) -> Database:
    name = f"file:{quote(str(path.absolute()))}"
    db = _connect(f"{name}?mode=ro", uri=True)
    try:
        db.execute("SELECT count(*) FROM sqlite_master")
    except sqlite3.OperationalError:
        db.close()
        if path.with_name(path.name + "-wal").exists():
            raise
        # In a read-only folder WAL's side files cannot be made; no other process can write there either.
        return _connect(f"{name}?mode=ro&immutable=1", uri=True)
    except BaseException:
        db.close()
        raise
    return db


def _use_wal(db: Database) -> None:
    # Changing the journal mode needs an exclusive lock and does not wait for it, in spite of busy_timeout.
    deadline = time.monotonic() + BUSY_SECONDS
    while db.journal_mode != "wal":
        try:
            db.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
    db.execute("PRAGMA synchronous = NORMAL")


def _pending(db: Database, path: Path) -> bool:
    """True if migrations are pending. DataError for another program's database, or one from a newer version."""
    tables = set(db.table_names())
    if not tables:
        return True
    applied = {migration.name for migration in schema.migrations().applied(db)}
    if not applied:
        raise DataError(f"{path}: a database of another program", hint=_ELSEWHERE)
    unknown = applied - {step.__name__ for step in schema.STEPS}
    if unknown:
        raise DataError(
            f"{path}: written by a newer version of lora ({', '.join(sorted(unknown))})",
            hint="upgrade lora, or give another file with --db",
        )
    return bool(schema.migrations().pending(db))


def _migrate(db: Database, path: Path) -> None:
    if schema.migrations().applied(db) and schema.migrations().pending(db):
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        with contextlib.closing(sqlite3.connect(path.with_name(f"{path.name}.{stamp}.backup"))) as backup:
            db.conn.backup(backup)
    db.execute("BEGIN IMMEDIATE")
    try:
        schema.migrations().apply(db)
    except BaseException:
        db.rollback()
        raise
    db.commit()


def _refuse_other_files(path: Path) -> bool:
    """True if there is a file at `path`, which then is a database."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_SQLITE_MAGIC))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except IsADirectoryError as error:
        raise DataError(f"{path}: a folder, not a database file", hint=_ELSEWHERE) from error
    except OSError as error:
        raise OutputError(f"{path}: cannot be read ({error.strerror})", hint=_ELSEWHERE) from error
    if start and start != _SQLITE_MAGIC:
        raise DataError(f"{path}: not a database", hint=_ELSEWHERE)
    return True


@contextlib.contextmanager
def _explained(path: Path | None) -> Iterator[None]:
    where = path if path is not None else "the catalogue"
    try:
        yield
    except sqlite3.OperationalError as error:
        text = str(error)
        if "locked" in text or "busy" in text:
            raise OutputError(
                f"{where}: another lora has been writing for {BUSY_SECONDS:.0f} s", hint="rerun"
            ) from error
        if "disk" in text or "full" in text:
            raise OutputError(f"{where}: cannot be written ({text})", hint="free some space, then rerun") from error
        if "readonly" in text or "unable to open" in text:
            raise OutputError(f"{where}: cannot be written", hint=_ELSEWHERE) from error
        raise
    except sqlite3.DatabaseError as error:
        if "malformed" in str(error) or "not a database" in str(error):
            raise DataError(f"{where}: a damaged database ({error})", hint=_ELSEWHERE) from error
        raise


_ELSEWHERE = "give another file with --db, LORA_DB or db in lora.toml"
