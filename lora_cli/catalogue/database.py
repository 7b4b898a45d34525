"""The one SQLite file: how it is opened, brought up to date and written. Its tables are made in `migrations`."""

import contextlib
import os
import re
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lora_cli.catalogue import migrations as schema
from lora_cli.catalogue.places import has_moved, settle
from lora_cli.catalogue.sqlite import Database
from lora_cli.errors import DataError, LoraError, OutputError
from lora_cli.files import open_regular
from lora_cli.outputs import whole_file

BUSY_SECONDS = 30.0
_LEAST_ROOM = 65536
_SQLITE_MAGIC = b"SQLite format 3\x00"
_MOUNTS = Path("/proc/self/mounts")
_NETWORK = ("nfs", "cifs", "smb", "lustre", "ceph", "gpfs", "beegfs", "afs", "9p", "fuse.sshfs", "glusterfs", "ocfs2")
"""The names of file systems that several machines share, by their beginnings."""
_ELSEWHERE = "give another file with --db, LORA_DB or db in lora.toml"


class OpenDatabase:
    """The database at `path`, opened when it is first used: to read, and later to write.

    One object may be used by several threads, which hold `lock` as long as they use a connection.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = threading.RLock()
        self._reader: Database | None = None
        self._writer: Database | None = None

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        with self.lock:
            for db in (self._reader, self._writer):
                if db is not None:
                    db.close()
            self._reader = self._writer = None

    def read(self) -> Database:
        """The connection that reads."""
        if self._writer is not None:
            return self._writer
        if self._reader is None:
            self._reader = open_for_reading(self.path)
        return self._reader

    @contextlib.contextmanager
    def writing(self) -> Iterator[Database]:
        """One transaction; see `writing`."""
        with self.lock:
            if self._writer is None:
                self._writer = open_for_writing(self.path)
                if self._reader is not None:
                    self._reader.close()
                    self._reader = None
            with writing(self._writer) as db:
                yield db


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
    db = _connect(str(path), path)
    try:
        _choose_journal(db, path)
        if _pending(db, path):
            _migrate(db, path)
        if has_moved(db, path):
            with writing(db):
                settle(db, path)
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
        db = _connect(":memory:", path)
        schema.bring_up_to_date(db)
        return db
    db = _connect_read_only(path)
    try:
        behind = _pending(db, path)
        moved = not behind and has_moved(db, path)
    except BaseException:
        db.close()
        raise
    # What cannot be written is read with the paths that it holds.
    if not behind and not (moved and os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)):
        return db
    db.close()
    open_for_writing(path).close()
    return _connect_read_only(path)


@contextlib.contextmanager
def writing(db: Database) -> Iterator[Database]:
    """One transaction that takes the write lock at the start, so that waiting for the lock cannot fail halfway.

    Raises OutputError where the disk is full, or another process holds the lock for longer than 30 s.
    """
    db.execute("BEGIN IMMEDIATE")
    try:
        yield db
        db.execute("COMMIT")
    except BaseException:
        db.rollback()
        raise


class _Connection(sqlite3.Connection):
    """A connection whose errors about the file are those of this tool."""

    place: Path

    def cursor(self, *_: Any) -> "_Cursor":  # type: ignore[override]
        return super().cursor(_Cursor)

    def execute(self, *statement: Any) -> "_Cursor":
        return self.cursor().execute(*statement)

    def executemany(self, *statement: Any) -> "_Cursor":
        return self.cursor().executemany(*statement)


class _Cursor(sqlite3.Cursor):
    connection: _Connection

    def execute(self, *statement: Any) -> "_Cursor":
        with explained(self.connection.place):
            super().execute(*statement)
        return self

    def executemany(self, *statement: Any) -> "_Cursor":
        with explained(self.connection.place):
            super().executemany(*statement)
        return self

    def __next__(self) -> Any:
        try:
            return super().__next__()
        except sqlite3.DatabaseError as error:
            raise _of_the_file(error, self.connection.place) or error from error

    def fetchone(self) -> Any:
        with explained(self.connection.place):
            return super().fetchone()

    def fetchmany(self, *size: Any) -> list[Any]:
        with explained(self.connection.place):
            return super().fetchmany(*size)

    def fetchall(self) -> list[Any]:
        with explained(self.connection.place):
            return super().fetchall()


def _connect(name: str, place: Path, *, uri: bool = False) -> Database:
    # isolation_level None leaves every BEGIN to us. Threads share a connection under a lock of the catalogue's own.
    with explained(place):
        connection = sqlite3.connect(
            name,
            timeout=BUSY_SECONDS,
            isolation_level=None,
            uri=uri,
            check_same_thread=False,
            factory=_Connection,
        )
    connection.place = place
    try:
        return Database(connection, execute_plugins=False)
    except BaseException:
        connection.close()
        raise


def connect_unchecked(path: Path) -> sqlite3.Connection:
    """A plain connection that cannot write, for a file that may be damaged or of another version.

    Raises DataError for another kind of file, OutputError where it cannot be read.
    """
    _refuse_other_files(path)
    with explained(path):
        return sqlite3.connect(f"file:{quote(str(path.absolute()))}?mode=ro", timeout=BUSY_SECONDS, uri=True)


def _connect_read_only(path: Path) -> Database:
    name = f"file:{quote(str(path.absolute()))}"
    db = _connect(f"{name}?mode=ro", path, uri=True)
    try:
        db.execute("SELECT count(*) FROM sqlite_master")
    except OutputError as error:
        db.close()
        # WAL's side files cannot be made there, and no other process has them in use.
        busy = kind_of(error.__cause__) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
        if not busy and is_at_rest(path):
            return _connect(f"{name}?mode=ro&immutable=1", path, uri=True)
        raise
    except BaseException:
        db.close()
        raise
    return db


def _choose_journal(db: Database, path: Path) -> None:
    """WAL, which lets readers and a writer work at once, but on network file systems a rollback journal.

    WAL shares memory between processes, which those of two machines cannot: the file would be damaged.
    """
    wanted = "delete" if _on_network(path) else "wal"
    # Changing the journal mode needs an exclusive lock and does not wait for it, in spite of busy_timeout.
    deadline = time.monotonic() + BUSY_SECONDS
    while db.journal_mode != wanted:
        try:
            db.execute(f"PRAGMA journal_mode = {wanted}")
        except OutputError as error:
            held = kind_of(error.__cause__) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
            if not held or time.monotonic() > deadline:
                raise
            time.sleep(0.02)
    db.execute(f"PRAGMA synchronous = {'NORMAL' if wanted == 'wal' else 'FULL'}")


def _on_network(path: Path) -> bool:
    """Whether a file is on a file system that several machines share, as far as the system tells (Linux)."""
    try:
        mounts = _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape")
        folder = path.parent.resolve()
    except OSError:
        return False
    best, kind = -1, ""
    for line in mounts.splitlines():
        place, found = line.split()[1:3]
        place = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), place)
        # The last of several mounts at one place is the one in use.
        if folder.is_relative_to(place) and len(place) >= best:
            best, kind = len(place), found
    return kind.startswith(_NETWORK)


def _pending(db: Database, path: Path) -> bool:
    """True if migrations are pending. DataError for another program's database, or one from a newer version."""
    tables = set(db.table_names())
    if not tables:
        return True
    applied = schema.applied(db)
    if not applied:
        raise DataError(f"{path}: a database of another program", hint=_ELSEWHERE)
    ours = {step.__name__ for step in schema.STEPS}
    if unknown := applied - ours:
        raise DataError(
            f"{path}: written by a newer version of lora ({', '.join(sorted(unknown))})",
            hint="upgrade lora, or give another file with --db",
        )
    return applied != ours


def _migrate(db: Database, path: Path) -> None:
    if schema.applied(db):
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        copy = path.with_name(f"{path.name}.{stamp}.backup")
        with whole_file(copy) as file, explained(copy), contextlib.closing(sqlite3.connect(file.name)) as backup:
            db.conn.backup(backup)
    db.execute("BEGIN IMMEDIATE")
    try:
        schema.bring_up_to_date(db)
    except BaseException:
        db.rollback()
        raise
    db.commit()


def _refuse_other_files(path: Path) -> bool:
    """True if there is a file at `path`, which then is a database."""
    try:
        with open_regular(path) as file:
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
def explained(path: Path) -> Iterator[None]:
    """The tool's own error for one of SQLite about the file; others pass."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        if (ours := _of_the_file(error, path)) is not None:
            raise ours from error
        raise


def _of_the_file(error: sqlite3.DatabaseError, path: Path) -> LoraError | None:
    match kind_of(error):
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return OutputError(f"{path}: another lora has been writing for {BUSY_SECONDS:.0f} s", hint="rerun")
        case sqlite3.SQLITE_FULL:
            return OutputError(f"{path}: no space left on the disk", hint="free some space, then rerun")
        case sqlite3.SQLITE_IOERR if _is_full(path.parent):
            return OutputError(f"{path}: no space left on the disk", hint="free some space, then rerun")
        case sqlite3.SQLITE_IOERR:
            return OutputError(f"{path}: cannot be read or written ({error})", hint="check the disk, then rerun")
        case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_PERM:
            return OutputError(f"{path}: cannot be written", hint=_ELSEWHERE)
        case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
            return DataError(f"{path}: a damaged database ({error})", hint="lora pool doctor rescues what is whole")
    return None


def _is_full(folder: Path) -> bool:
    """Whether the disk has no room for the file that processes share in WAL mode: SQLite does not call that full."""
    try:
        return shutil.disk_usage(folder).free < _LEAST_ROOM
    except OSError:
        return False


def is_at_rest(path: Path) -> bool:
    """Whether nobody can write to the database: in a read-only folder, or on a full disk when its log is empty."""
    if not os.access(path.parent, os.W_OK):
        return True
    log = path.with_name(f"{path.name}-wal")
    return _is_full(path.parent) and not (log.exists() and log.stat().st_size)


def kind_of(error: BaseException | None) -> int:
    """The kind of an error of SQLite, 0 for another error; see https://www.sqlite.org/rescode.html."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF
