"""The schema's first steps: adapters, selections, runs, scores, syncs, and thin rows. Never edit one."""

from lora_cli.catalogue.sqlite import Database


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


def m002_revision_and_notes(db: Database) -> None:
    """The revision of an adapter's base, and notes on repairs and omissions in its file."""
    for column in ("revision", "notes"):
        db.execute(f"ALTER TABLE adapters ADD COLUMN {column} TEXT NOT NULL DEFAULT ''")


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


def m004_spreads(db: Database) -> None:
    """How the updates of adapters spread over singular directions, by module, beside the rows and not in them."""
    db.execute(
        """
        CREATE TABLE spreads (
            adapter INTEGER PRIMARY KEY REFERENCES adapters (key) ON DELETE CASCADE,
            "commit" TEXT NOT NULL,
            modules BLOB NOT NULL
        )
        """
    )
