"""The places of files in a catalogue that was moved or copied together with them."""

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from lora_cli.catalogue.rows import quoted, text
from lora_cli.catalogue.sqlite import Database

_PLACES = frozenset(("repo", "base", "judged_for", "source", "out", "adapter_id"))
"""The columns that hold the path of a folder, or another name. The id of an adapter may be its path too."""


def home_of(path: Path) -> str:
    """The folder of the database at `path`, links resolved."""
    return text(str(path.resolve().parent))


def has_moved(db: Database, path: Path) -> bool:
    """Whether the database was last written in another folder, or never in one that it knows."""
    return db.execute("SELECT folder FROM home").fetchall() != [(home_of(path),)]


def settle(db: Database, path: Path) -> None:
    """Take the folder of `path` as the database's home, and follow the files that came along; in a transaction.

    A file came along if it lay beneath the folder that was moved or copied, and is at the same place beneath the new
    one. Other paths stay as they are.
    """
    here = home_of(path)
    for (before,) in db.execute("SELECT folder FROM home").fetchall():
        old, new = _roots(before, here)
        if old != new:
            _follow(db, old, new)
    db.execute("INSERT OR REPLACE INTO home (one, folder) VALUES (1, ?)", [here])


def _roots(old: str, new: str) -> tuple[str, str]:
    """The folders that differ in name: of /a/x/data, moved to /b/x/data, these are /a and /b."""
    while os.path.basename(old) and os.path.basename(old) == os.path.basename(new):  # noqa: PTH119
        old, new = os.path.dirname(old), os.path.dirname(new)  # noqa: PTH120
    return old, new


def _follow(db: Database, old: str, new: str) -> None:
    @cache
    def followed(place: str) -> str:
        # An output's path may lead through a link.
        for known in (place, os.path.realpath(place)):
            if known == old or known.startswith(f"{old.rstrip('/')}/"):
                there = new + known[len(old) :] if old != "/" else new.rstrip("/") + known
                if os.path.lexists(there):
                    return there
        return place

    db.conn.create_function("followed", 1, followed, deterministic=True)
    for table, column in _columns(db):
        name = quoted([column])
        db.execute(f"UPDATE OR REPLACE {table} SET {name} = followed({name}) WHERE substr({name}, 1, 1) = '/'")


def _columns(db: Database) -> Iterator[tuple[str, str]]:
    """Every column that may hold a path, with its table."""
    for table in db.table_names():
        columns = [row[1] for row in db.execute(f"PRAGMA table_info({quoted([table])})")]
        yield from ((quoted([table]), column) for column in columns if column in _PLACES)
    yield "adapters", "id"
