"""The selections: adapters chosen together, in order, each pinned to its commit."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from lora_cli.catalogue.database import OpenDatabase
from lora_cli.catalogue.rows import clean
from lora_cli.records import Adapter, AdapterRef, AdapterRow


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Adapters chosen together: pinned references in order, with the score of each if the method gave one."""

    id: int
    name: str
    created: str
    method: str
    settings: Mapping[str, Any]
    refs: tuple[AdapterRef, ...]
    scores: tuple[float | None, ...]


class Selections:
    """The selections of a catalogue; `get` finds an adapter by its id, and raises NothingMatched for none."""

    def __init__(self, db: OpenDatabase, get: Callable[[str], Adapter]) -> None:
        self._db = db
        self._get = get

    def all(self) -> list[dict[str, Any]]:
        """Every selection, the newest first: number, name, time, method and number of adapters."""
        with self._db.lock:
            return list(
                self._db.read().query(
                    "SELECT id, name, created, method, "
                    "(SELECT count(*) FROM selected WHERE selection_id = id) AS adapters "
                    "FROM selections ORDER BY id DESC"
                )
            )

    def drop(self, name: str) -> int:
        """Delete the selections of this name or number; returns the number deleted."""
        with self._db.writing() as db:
            return int(db.execute("DELETE FROM selections WHERE name = ? OR id = ?", [*clean([name]), name]).rowcount)

    def pinned(self) -> set[tuple[str, str]]:
        """The adapters of all selections, by id and commit."""
        with self._db.lock:
            return set(self._db.read().execute('SELECT DISTINCT adapter_id, "commit" FROM selected').fetchall())

    def names(self) -> list[str]:
        """The names of selections, the newest first."""
        with self._db.lock:
            rows = self._db.read().execute(
                "SELECT name FROM selections WHERE name != '' GROUP BY name ORDER BY max(id) DESC"
            )
            return [row[0] for row in rows]

    def remember(
        self,
        name: str,
        chosen: Sequence[tuple[AdapterRow | AdapterRef, float | None]],
        method: str,
        settings: Mapping[str, Any],
    ) -> int:
        """Store a selection, in order, and return its number."""
        created = datetime.now(UTC).isoformat(timespec="microseconds")
        with self._db.writing() as db:
            cursor = db.execute(
                "INSERT INTO selections (name, created, method, settings) VALUES (?, ?, ?, ?)",
                [name, created, method, json.dumps(dict(settings))],
            )
            number = int(cursor.lastrowid or 0)
            for position, (adapter, score) in enumerate(chosen):
                db.execute(
                    "INSERT INTO selected VALUES (?, ?, ?, ?, ?)", [number, position, adapter.id, adapter.commit, score]
                )
        return number

    def last(self, name: str | None = None) -> Selection | None:
        """The newest selection, or the newest of this name; None if there is none.

        Its adapters stay pinned to their commits. NothingMatched if one of them is no longer in the catalogue.
        """
        test, values = ("WHERE name = ?", [name]) if name is not None else ("", [])
        with self._db.lock:
            db = self._db.read()
            found = list(db.query(f"SELECT * FROM selections {test} ORDER BY id DESC LIMIT 1", values))
            if not found:
                return None
            [row] = found
            chosen = db.execute(
                'SELECT score, adapter_id, s."commit", source, repo, subfolder FROM selected s '
                "LEFT JOIN adapters ON id = adapter_id WHERE selection_id = ? ORDER BY position",
                [row["id"]],
            ).fetchall()
            refs = tuple(
                AdapterRef(id=id, commit=commit, source=source, repo=repo, subfolder=subfolder)
                if source is not None
                else self._get(id).ref
                for _, id, commit, source, repo, subfolder in chosen
            )
        return Selection(
            id=row["id"],
            name=row["name"],
            created=row["created"],
            method=row["method"],
            settings=json.loads(row["settings"]),
            refs=refs,
            scores=tuple(score for score, *_ in chosen),
        )
