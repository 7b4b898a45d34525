"""The schema of the catalogue's database, one step at a time. Append to STEPS; never edit an old step."""

import hashlib

from lora_cli.catalogue.first_migrations import (
    m001_adapters_selections_runs,
    m002_revision_and_notes,
    m003_thin_rows,
    m004_spreads,
)
from lora_cli.catalogue.sqlite import Database, Migrations


def m005_scores_of_adapters(db: Database) -> None:
    """The adapter, its commit and the task of a score; imported scores; the newest score of each adapter as a view."""
    for statement in _M005:
        db.execute(statement)


_M005 = (
    # A score of an evaluation outlives its adapter, as its run does.
    "ALTER TABLE scores ADD COLUMN adapter INTEGER REFERENCES adapters (key) ON DELETE SET NULL",
    """ALTER TABLE scores ADD COLUMN "commit" TEXT NOT NULL DEFAULT ''""",
    "ALTER TABLE scores ADD COLUMN task TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE scores ADD COLUMN imported INTEGER NOT NULL DEFAULT 0",
    """
    UPDATE scores SET task = coalesce(
        (SELECT json_extract(record, '$.settings.data') FROM runs WHERE runs.id = run_id)
        || '@' || substr(task_sha256, 1, 8), ''
    )
    """,
    """
    UPDATE scores SET
        "commit" = substr(json_extract(adapters, '$[0]'), -40),
        adapter = (
            SELECT key FROM adapters a, (SELECT json_extract(scores.adapters, '$[0]') AS pinned)
            WHERE a.id = substr(pinned, 1, length(pinned) - 41)
        )
    WHERE json_array_length(adapters) = 1 AND substr(json_extract(adapters, '$[0]'), -41, 1) = '@'
    """,
    "CREATE INDEX scores_adapter ON scores (adapter, task, metric)",
    "CREATE INDEX scores_task ON scores (task, metric)",
    "CREATE UNIQUE INDEX scores_imported ON scores (adapter, task, metric) WHERE imported",
    # The trigger sees every way in which an adapter goes, as the foreign key does.
    """
    CREATE TRIGGER scores_forgotten AFTER UPDATE OF adapter ON scores WHEN new.imported AND new.adapter IS NULL BEGIN
        DELETE FROM scores WHERE id = new.id;
    END
    """,
    """
    CREATE VIEW adapter_scores AS
    SELECT a.id, s."commit", s.task, s.metric, s.value, s.low, s.high, s.n, s.imported, s.run_id, s.adapter
    FROM scores s JOIN adapters a ON a.key = s.adapter
    WHERE s.value IS NOT NULL AND s.id = (
        SELECT max(t.id) FROM scores t
        WHERE t.adapter = s.adapter AND t.task = s.task AND t.metric = s.metric AND t."commit" IN ('', a."commit")
    )
    """,
)


def m006_verdicts_per_base(db: Database) -> None:
    """The base that a row was judged for, verdicts for further bases beside the rows, and how far listings came."""
    db.execute("ALTER TABLE adapters ADD COLUMN judged_for TEXT NOT NULL DEFAULT ''")
    db.execute("UPDATE adapters SET judged_for = base WHERE base_match != 'mismatch'")
    # A stamp holds the digest of the base that was asked for: of a Hub's row at its start, of a folder's after a colon.
    for (base,) in db.execute("SELECT DISTINCT base FROM syncs WHERE base != ''").fetchall():
        digest = hashlib.sha256(base.encode()).hexdigest()[:16]
        db.execute(
            "UPDATE adapters SET judged_for = ? "
            "WHERE substr(stamp, 1, 17) = ? OR (source = 'folder' AND substr(stamp, 18, 17) = ?)",
            [base, f"{digest}:", f"{digest}:"],
        )
    # The column is the last of a row, behind its long texts: only the index is read.
    db.execute("CREATE INDEX adapters_judged_for ON adapters (judged_for, id)")
    for statement in _M006:
        db.execute(statement)


_M006 = (
    """
    CREATE TABLE verdicts (
        key INTEGER PRIMARY KEY,
        adapter INTEGER NOT NULL REFERENCES adapters (key) ON DELETE CASCADE,
        judged_for TEXT NOT NULL,
        "commit" TEXT NOT NULL,
        base_declared TEXT NOT NULL,
        revision TEXT NOT NULL,
        base TEXT NOT NULL,
        base_match TEXT NOT NULL,
        rank INTEGER,
        alpha REAL,
        scale REAL,
        rslora INTEGER NOT NULL,
        target_modules TEXT NOT NULL,
        modules INTEGER NOT NULL,
        layers INTEGER NOT NULL,
        dtype TEXT NOT NULL,
        parameters INTEGER NOT NULL,
        sha256 TEXT NOT NULL,
        norm REAL,
        stamp TEXT NOT NULL,
        status TEXT NOT NULL,
        reason TEXT NOT NULL,
        notes TEXT NOT NULL,
        rank_total INTEGER NOT NULL,
        ranks TEXT NOT NULL,
        UNIQUE (judged_for, adapter)
    )
    """,
    "CREATE INDEX verdicts_adapter ON verdicts (adapter)",
    """
    CREATE TABLE listings (
        endpoint TEXT NOT NULL,
        base TEXT NOT NULL,
        name TEXT NOT NULL,
        next TEXT NOT NULL DEFAULT '',
        asked TEXT NOT NULL DEFAULT '',
        PRIMARY KEY (endpoint, base, name)
    ) WITHOUT ROWID
    """,
)


def m007_sketches(db: Database) -> None:
    """Sketches of whole updates, beside the rows; `content` is what one was made from."""
    db.execute(
        """
        CREATE TABLE sketches (
            adapter INTEGER PRIMARY KEY REFERENCES adapters (key) ON DELETE CASCADE,
            "commit" TEXT NOT NULL,
            content TEXT NOT NULL,
            by_base INTEGER NOT NULL,
            numbers BLOB NOT NULL
        )
        """
    )


def m008_home_and_datasets(db: Database) -> None:
    """The folder in which the catalogue was last written, and the data sets that an adapter's card names."""
    db.execute("CREATE TABLE home (one INTEGER PRIMARY KEY CHECK (one = 1), folder TEXT NOT NULL)")
    db.execute("ALTER TABLE adapters ADD COLUMN datasets TEXT NOT NULL DEFAULT '[]'")
    db.execute("CREATE INDEX adapters_repo ON adapters (repo)")


def m009_views(db: Database) -> None:
    """Views of what JSON columns and ids hold, and a full-text search that Datasette and sqlite-utils find."""
    for statement in _M009:
        db.execute(statement)


_M009 = (
    # They look for the table's name in double quotes.
    "DROP TABLE adapters_fts",
    """
    CREATE VIRTUAL TABLE adapters_fts USING fts5 (
        id, author, target_modules, card, content="adapters", content_rowid='key', tokenize='unicode61'
    )
    """,
    "INSERT INTO adapters_fts (adapters_fts) VALUES ('rebuild')",
    """
    CREATE VIEW usable AS
    SELECT key, id, author, base, rank, scale, modules, dtype, parameters, bytes, licence, downloads, likes, created_at
    FROM adapters WHERE status = 'ok'
    """,
    """
    CREATE VIEW selected_adapters AS
    SELECT s.id AS selection, s.name, s.method, c.position, c.score, c.adapter_id, c."commit", a.key AS adapter,
        a."commit" = c."commit" AS is_current
    FROM selected c JOIN selections s ON s.id = c.selection_id LEFT JOIN adapters a ON a.id = c.adapter_id
    """,
    """
    CREATE VIEW run_inputs AS
    SELECT r.id AS run, r.command, r.status, r.started, j.key AS pinned, j.value AS sha256, a.key AS adapter
    FROM runs r JOIN json_each(r.record, '$.inputs') j
        LEFT JOIN adapters a ON a.id = substr(j.key, 1, length(j.key) - 41) AND a."commit" = substr(j.key, -40)
    """,
    """
    CREATE VIEW adapter_modules AS
    SELECT a.key AS adapter, a.id, j.key AS module, j.value AS rank FROM adapters a JOIN json_each(a.ranks) j
    """,
)


def m010_stated_hashes(db: Database) -> None:
    """The hash of an adapter's weights as the Hub states it, "" until the adapter is read again."""
    for table in ("adapters", "verdicts"):
        db.execute(f"ALTER TABLE {table} ADD COLUMN hub_sha256 TEXT NOT NULL DEFAULT ''")
    # The column is the last of a row, behind its long texts: select --dedupe reads the index alone.
    db.execute('CREATE INDEX adapters_hashes ON adapters (status, base, id, "commit", author, sha256, hub_sha256)')


STEPS = (
    m001_adapters_selections_runs,
    m002_revision_and_notes,
    m003_thin_rows,
    m004_spreads,
    m005_scores_of_adapters,
    m006_verdicts_per_base,
    m007_sketches,
    m008_home_and_datasets,
    m009_views,
    m010_stated_hashes,
)


def applied(db: Database) -> set[str]:
    """The names of the steps that a database has taken; those of a newer version are not in `STEPS`."""
    return {step.name for step in migrations().applied(db)}


def bring_up_to_date(db: Database) -> None:
    """Take the steps that a database has not taken yet."""
    migrations().apply(db)


def migrations() -> Migrations:
    """The steps, in their order."""
    ordered = Migrations("lora")
    for step in STEPS:
        ordered()(step)
    return ordered
