"""An adapter as it was judged for each base model: its row holds one verdict, the table `verdicts` the others.

A row keeps the first verdict by which the adapter is usable, else the last one. What does not depend on the base
(author, licence, size, card, …) stands in the row alone.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Final, NamedTuple

from lora_cli.catalogue.database import OpenDatabase
from lora_cli.catalogue.rows import UPSERT, clean, quoted, row_of, text
from lora_cli.catalogue.sqlite import Database
from lora_cli.records import USABLE, Adapter

COLUMNS = (
    "commit", "base_declared", "revision", "base", "base_match", "rank", "alpha", "scale", "rslora", "target_modules",
    "modules", "layers", "dtype", "parameters", "sha256", "norm", "stamp", "status", "reason", "notes", "rank_total",
    "ranks", "hub_sha256",
)  # fmt: skip
"""The columns of a row that a verdict has of its own. Its ranks are "" where they are the row's: they take 16 kB."""

_INTO = f"INSERT OR REPLACE INTO verdicts (judged_for, adapter, {quoted(COLUMNS)})"


class Shown(NamedTuple):
    """Where the adapters of a base are read from: a table or a subquery, a condition on it, and the values of both."""

    table: str
    test: str
    values: Sequence[str]


EVERY: Final = Shown("adapters", "1", ())
"""Every adapter's own row."""


def shown(db: Database, base: str, columns: Sequence[str]) -> Shown:
    """The adapters that were judged for `base`, one row each, with `columns`."""
    base = text(base)
    elsewhere = db.execute("SELECT EXISTS (SELECT 1 FROM verdicts WHERE judged_for = ?)", [base]).fetchone()[0]
    if not elsewhere:
        # Two looks into the index: without rows of another base, no row needs a test.
        others = "SELECT EXISTS (SELECT 1 FROM adapters WHERE judged_for < ?1 OR judged_for > ?1)"
        if not db.execute(others, [base]).fetchone()[0]:
            return EVERY
        return Shown("adapters", "judged_for = ?", (base,))
    names = list(dict.fromkeys(["key", "id", *columns]))
    own = ", ".join(f'{_source(name)} AS "{name}"' for name in names)
    table = (
        f"(SELECT {quoted(names)} FROM adapters WHERE judged_for = ? UNION ALL "
        f"SELECT {own} FROM verdicts v JOIN adapters a ON a.key = v.adapter WHERE v.judged_for = ?)"
    )
    return Shown(table, "1", (base, base))


def _source(name: str) -> str:
    """The column of a verdict or of its adapter's row."""
    if name == "ranks":
        return "CASE v.ranks WHEN '' THEN a.ranks ELSE v.ranks END"
    return f'{"v" if name in COLUMNS else "a"}."{name}"'


def put(db: Database, adapter: Adapter, asked: str, hub_id: str, seen: str) -> None:
    """Store an adapter as it was judged for the base `asked`, "" for any: then for the base that it declares."""
    judged_for = text(asked or adapter.base)
    total = sum(adapter.ranks.values())
    held = db.execute(
        'SELECT key, judged_for, status, "commit" FROM adapters WHERE id = ?', [text(adapter.id)]
    ).fetchone()
    if held is not None and held[1] not in ("", judged_for):
        if not _takes_the_row(adapter, status=held[2], commit=held[3]):
            names = (*(field.name for field in fields(Adapter)), "rank_total")
            values = dict(zip(names, [*row_of(adapter), total], strict=True))
            if db.execute("SELECT ranks = ? FROM adapters WHERE key = ?", [values["ranks"], held[0]]).fetchone()[0]:
                values["ranks"] = ""
            marks = ", ".join("?" * (2 + len(COLUMNS)))
            db.execute(f"{_INTO} VALUES ({marks})", [judged_for, held[0], *(values[name] for name in COLUMNS)])
            return
        db.execute(f"{_INTO} SELECT judged_for, key, {quoted(COLUMNS)} FROM adapters WHERE key = ?", [held[0]])
    if held is not None and held[3] != adapter.commit:
        of_row = "(SELECT ranks FROM adapters WHERE key = adapter)"
        db.execute(f"UPDATE verdicts SET ranks = {of_row} WHERE adapter = ? AND ranks = ''", [held[0]])
    db.execute(UPSERT, [*row_of(adapter), total, hub_id, seen, judged_for])
    if held is not None:
        db.execute("DELETE FROM verdicts WHERE adapter = ? AND judged_for = ?", [held[0], judged_for])


def _takes_the_row(adapter: Adapter, *, status: str, commit: str) -> bool:
    """Whether a verdict for another base becomes the one of the row, which is at `commit` and has this `status`."""
    if adapter.status in USABLE:
        return status not in USABLE or adapter.commit != commit
    return status not in USABLE and adapter.commit != commit


def learn(db: Database, adapter: Adapter) -> None:
    """Store the facts from reading the weights at the verdict that has this stamp and commit, else at the row."""
    which = 'adapter = (SELECT key FROM adapters WHERE id = ?) AND "commit" = ? AND stamp = ?'
    of_verdict = [adapter.id, adapter.commit, adapter.stamp]
    if db.execute(f"SELECT EXISTS (SELECT 1 FROM verdicts WHERE {which})", of_verdict).fetchone()[0]:
        table, test, values = "verdicts", which, of_verdict
    else:
        table, test, values = "adapters", 'id = ? AND "commit" = ?', [adapter.id, adapter.commit]
        db.execute(f"UPDATE adapters SET bytes = ? WHERE {test}", [adapter.bytes, *values])
    db.execute(f"UPDATE {table} SET sha256 = ?, norm = ? WHERE {test}", [adapter.sha256, adapter.norm, *values])
    db.execute(
        f"UPDATE {table} SET status = ?, reason = ? WHERE {test} AND NOT (status = 'quarantined' AND ? = 'ok')",
        [adapter.status, adapter.reason, *values, adapter.status],
    )


def set_status(db: Database, id: str, status: str, reason: str, base: str | None = None) -> None:
    """Give an adapter another status for one base, None for every base."""
    of_row, of_verdict, values = "", "", clean([status, reason, id])
    if base is not None:
        of_row, of_verdict, values = " AND judged_for = ?", " AND judged_for = ?", [*values, text(base)]
    db.execute(f"UPDATE adapters SET status = ?, reason = ? WHERE id = ?{of_row}", values)
    adapter = "adapter = (SELECT key FROM adapters WHERE id = ?)"
    db.execute(f"UPDATE verdicts SET status = ?, reason = ? WHERE {adapter}{of_verdict}", values)


class Bases:
    """The base models that adapters were judged for."""

    def __init__(self, db: OpenDatabase) -> None:
        self._db = db

    def counts(self) -> dict[str, int]:
        """Every such base with its number of adapters, the most frequent first."""
        query = (
            "SELECT judged_for, count(*) FROM "
            "(SELECT judged_for FROM adapters UNION ALL SELECT judged_for FROM verdicts) "
            "WHERE judged_for != '' GROUP BY 1 ORDER BY 2 DESC, 1"
        )
        with self._db.lock:
            return dict(self._db.read().execute(query).fetchall())
