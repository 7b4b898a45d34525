"""The one SQLite file: opening it, and its schema, one migration at a time. Append; never edit an old one.

Catalogue, selections, runs and scores are in the same file, so `catalogue` and `runs` open it through here.
"""

import contextlib
import sqlite3
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

from lora_cli.errors import DataError, OutputError


@contextlib.contextmanager
def _without(*names: str) -> Iterator[None]:
    """Hide packages from an import: sqlite_utils imports numpy and pandas if installed, which takes 0.2 s."""
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


with _without("numpy", "pandas"):
    from sqlite_utils import Database, Migrations

__all__ = ["Database", "open_for_reading", "open_for_writing", "writing"]

BUSY_SECONDS = 30.0
_SQLITE_MAGIC = b"SQLite format 3\x00"

migrations = Migrations("lora")


@migrations()
def m001_adapters_selections_runs(db: Database) -> None:
    """Adapters with full-text search, aliases, selections, runs, scores and syncs."""
    for statement in _M001:
        db.execute(statement)


_M001 = (
    """
    CREATE TABLE adapters (
        key INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        "commit" TEXT NOT NULL,
        source TEXT NOT NULL,
        repo TEXT NOT NULL,
        subfolder TEXT NOT NULL DEFAULT '',
        author TEXT NOT NULL DEFAULT '',
        base_declared TEXT NOT NULL DEFAULT '',
        base TEXT NOT NULL DEFAULT '',
        base_match TEXT NOT NULL DEFAULT 'unknown',
        peft_type TEXT NOT NULL DEFAULT '',
        rank INTEGER,
        alpha REAL,
        scale REAL,
        rslora INTEGER NOT NULL DEFAULT 0,
        ranks TEXT NOT NULL DEFAULT '{}',
        target_modules TEXT NOT NULL DEFAULT '[]',
        modules INTEGER NOT NULL DEFAULT 0,
        layers INTEGER NOT NULL DEFAULT 0,
        dtype TEXT NOT NULL DEFAULT '',
        parameters INTEGER NOT NULL DEFAULT 0,
        bytes INTEGER NOT NULL DEFAULT 0,
        sha256 TEXT NOT NULL DEFAULT '',
        norm REAL,
        licence TEXT NOT NULL DEFAULT '',
        downloads INTEGER NOT NULL DEFAULT 0,
        likes INTEGER NOT NULL DEFAULT 0,
        gated TEXT NOT NULL DEFAULT '',
        created_at TEXT NOT NULL DEFAULT '',
        modified_at TEXT NOT NULL DEFAULT '',
        card TEXT NOT NULL DEFAULT '',
        stamp TEXT NOT NULL DEFAULT '',
        status TEXT NOT NULL DEFAULT 'ok',
        reason TEXT NOT NULL DEFAULT '',
        hub_id TEXT NOT NULL DEFAULT '',
        seen_at TEXT NOT NULL DEFAULT ''
    )
    """,
    "CREATE INDEX adapters_base_status ON adapters (base, status)",
    "CREATE INDEX adapters_hub_id ON adapters (hub_id)",
    """
    CREATE VIRTUAL TABLE adapters_fts USING fts5 (
        id, author, target_modules, card, content='adapters', content_rowid='key', tokenize='unicode61'
    )
    """,
    """
    CREATE TRIGGER adapters_fts_insert AFTER INSERT ON adapters BEGIN
        INSERT INTO adapters_fts (rowid, id, author, target_modules, card)
        VALUES (new.key, new.id, new.author, new.target_modules, new.card);
    END
    """,
    """
    CREATE TRIGGER adapters_fts_delete AFTER DELETE ON adapters BEGIN
        INSERT INTO adapters_fts (adapters_fts, rowid, id, author, target_modules, card)
        VALUES ('delete', old.key, old.id, old.author, old.target_modules, old.card);
    END
    """,
    # Only these columns: a sync that refreshes a thousand download counts must not index a thousand cards again.
    """
    CREATE TRIGGER adapters_fts_update AFTER UPDATE OF key, id, author, target_modules, card ON adapters BEGIN
        INSERT INTO adapters_fts (adapters_fts, rowid, id, author, target_modules, card)
        VALUES ('delete', old.key, old.id, old.author, old.target_modules, old.card);
        INSERT INTO adapters_fts (rowid, id, author, target_modules, card)
        VALUES (new.key, new.id, new.author, new.target_modules, new.card);
    END
    """,
    "CREATE TABLE aliases (alias TEXT PRIMARY KEY, base TEXT NOT NULL)",
    """
    CREATE TABLE selections (
        id INTEGER PRIMARY KEY,
        name TEXT NOT NULL DEFAULT '',
        created TEXT NOT NULL,
        method TEXT NOT NULL,
        settings TEXT NOT NULL DEFAULT '{}'
    )
    """,
    """
    CREATE TABLE selected (
        selection_id INTEGER NOT NULL REFERENCES selections (id) ON DELETE CASCADE,
        position INTEGER NOT NULL,
        adapter_id TEXT NOT NULL,
        "commit" TEXT NOT NULL,
        score REAL,
        PRIMARY KEY (selection_id, position)
    ) WITHOUT ROWID
    """,
    """
    CREATE TABLE runs (
        id TEXT PRIMARY KEY,
        command TEXT NOT NULL,
        status TEXT NOT NULL,
        started TEXT NOT NULL,
        ended TEXT,
        out TEXT,
        record TEXT NOT NULL DEFAULT '{}',
        error TEXT
    )
    """,
    "CREATE INDEX runs_started ON runs (started)",
    """
    CREATE TABLE scores (
        id INTEGER PRIMARY KEY,
        run_id TEXT NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
        system TEXT NOT NULL,
        adapters TEXT NOT NULL DEFAULT '[]',
        task_sha256 TEXT NOT NULL DEFAULT '',
        metric TEXT NOT NULL,
        value REAL,
        low REAL,
        high REAL,
        n INTEGER NOT NULL DEFAULT 0,
        details TEXT NOT NULL DEFAULT '{}'
    )
    """,
    "CREATE INDEX scores_run_id ON scores (run_id)",
    """
    CREATE TABLE syncs (
        id INTEGER PRIMARY KEY,
        started TEXT NOT NULL,
        ended TEXT,
        source TEXT NOT NULL,
        base TEXT NOT NULL DEFAULT '',
        report TEXT NOT NULL DEFAULT '{}'
    )
    """,
)


@migrations()
def m002_revision_and_notes(db: Database) -> None:
    """The revision of an adapter's base, and notes on repairs and omissions in its file."""
    for column in ("revision", "notes"):
        db.execute(f"ALTER TABLE adapters ADD COLUMN {column} TEXT NOT NULL DEFAULT ''")


@migrations()
def m003_thin_rows(db: Database) -> None:
    """Put ranks and card last in a row, and the columns for selection into an index: neither reads the long texts."""
    before = [f'"{column.name}"' for column in db.table("adapters").columns]
    for name in ("insert", "delete", "update"):
        db.execute(f"DROP TRIGGER adapters_fts_{name}")
    db.execute("ALTER TABLE adapters RENAME TO adapters_before")
    db.execute(_M003_ADAPTERS)
    db.execute(
        f"INSERT INTO adapters ({', '.join(before)}, rank_total) SELECT {', '.join(before)}, "
        "(SELECT coalesce(sum(value), 0) FROM json_each(ranks)) FROM adapters_before"
    )
    db.execute("DROP TABLE adapters_before")
    # The indexes and the triggers of the full-text search, as they were.
    for statement in (*_M001[1:3], *_M001[4:7]):
        db.execute(statement)
    db.execute(
        "CREATE INDEX adapters_candidates "
        'ON adapters (status, base, id, "commit", author, rank, rank_total, downloads, likes)'
    )


_M003_ADAPTERS = """
    CREATE TABLE adapters (
        key INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        "commit" TEXT NOT NULL,
        source TEXT NOT NULL,
        repo TEXT NOT NULL,
        subfolder TEXT NOT NULL DEFAULT '',
        author TEXT NOT NULL DEFAULT '',
        base_declared TEXT NOT NULL DEFAULT '',
        base TEXT NOT NULL DEFAULT '',
        base_match TEXT NOT NULL DEFAULT 'unknown',
        peft_type TEXT NOT NULL DEFAULT '',
        rank INTEGER,
        alpha REAL,
        scale REAL,
        rslora INTEGER NOT NULL DEFAULT 0,
        target_modules TEXT NOT NULL DEFAULT '[]',
        modules INTEGER NOT NULL DEFAULT 0,
        layers INTEGER NOT NULL DEFAULT 0,
        dtype TEXT NOT NULL DEFAULT '',
        parameters INTEGER NOT NULL DEFAULT 0,
        bytes INTEGER NOT NULL DEFAULT 0,
        sha256 TEXT NOT NULL DEFAULT '',
        norm REAL,
        licence TEXT NOT NULL DEFAULT '',
        downloads INTEGER NOT NULL DEFAULT 0,
        likes INTEGER NOT NULL DEFAULT 0,
        gated TEXT NOT NULL DEFAULT '',
        created_at TEXT NOT NULL DEFAULT '',
        modified_at TEXT NOT NULL DEFAULT '',
        stamp TEXT NOT NULL DEFAULT '',
        status TEXT NOT NULL DEFAULT 'ok',
        reason TEXT NOT NULL DEFAULT '',
        hub_id TEXT NOT NULL DEFAULT '',
        seen_at TEXT NOT NULL DEFAULT '',
        revision TEXT NOT NULL DEFAULT '',
        notes TEXT NOT NULL DEFAULT '',
        rank_total INTEGER NOT NULL DEFAULT 0,
        ranks TEXT NOT NULL DEFAULT '{}',
        card TEXT NOT NULL DEFAULT ''
    )
"""


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
        migrations.apply(db)
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
    applied = {migration.name for migration in migrations.applied(db)}
    if not applied:
        raise DataError(f"{path}: a database of another program", hint=_ELSEWHERE)
    unknown = applied - {migration.name for migration in migrations._migrations}
    if unknown:
        raise DataError(
            f"{path}: written by a newer version of lora ({', '.join(sorted(unknown))})",
            hint="upgrade lora, or give another file with --db",
        )
    return bool(migrations.pending(db))


def _migrate(db: Database, path: Path) -> None:
    if migrations.applied(db) and migrations.pending(db):
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        with contextlib.closing(sqlite3.connect(path.with_name(f"{path.name}.{stamp}.backup"))) as backup:
            db.conn.backup(backup)
    db.execute("BEGIN IMMEDIATE")
    try:
        migrations.apply(db)
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
