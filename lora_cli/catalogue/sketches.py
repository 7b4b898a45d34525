"""The sketches of updates that `verify --deep` made. What they are is in `checks/sketch.py`; here they are bytes."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lora_cli.catalogue.database import OpenDatabase
from lora_cli.catalogue.rows import clean

_BATCH = 300  # pairs per statement, below SQLite's limit on parameters


class StoredSketch(NamedTuple):
    """A sketch as it is stored: `numbers` are float16, lowest byte first. `content` names what it was made from."""

    content: str
    by_base: bool
    numbers: bytes


class Sketches:
    """The sketched adapters of a catalogue. A sketch counts only as long as its adapter has the same commit."""

    def __init__(self, db: OpenDatabase) -> None:
        self._db = db

    def remember(self, made: Mapping[tuple[str, str], StoredSketch]) -> None:
        """Store the sketches of adapters by id and commit; those that are not in the catalogue are left out."""
        with self._db.writing() as db:
            for (id, commit), one in made.items():
                db.execute(
                    'INSERT OR REPLACE INTO sketches (adapter, "commit", content, by_base, numbers) '
                    'SELECT key, "commit", ?, ?, ? FROM adapters WHERE id = ? AND "commit" = ?',
                    [one.content, int(one.by_base), one.numbers, *clean([id, commit])],
                )

    def of(self, adapters: Sequence[tuple[str, str]]) -> dict[str, StoredSketch]:
        """The sketches of adapters by id, of those given by id and commit that have one."""
        found: dict[str, StoredSketch] = {}
        for start in range(0, len(adapters), _BATCH):
            batch = adapters[start : start + _BATCH]
            marks = ", ".join(["(?, ?)"] * len(batch))
            named = [text for one in batch for text in one]
            found |= self._read(f'WHERE (a.id, a."commit") IN (VALUES {marks})', named)
        return found

    def of_base(self, base: str, most: int) -> dict[str, StoredSketch]:
        """The sketches of the usable adapters of a base, by id; of more than `most` those whose commits come first."""
        return self._read(
            """WHERE a.base = ? AND a.status IN ('ok', 'quarantined') ORDER BY a."commit", a.id LIMIT ?""", [base, most]
        )

    def sketched(self) -> list[tuple[str, str, str, bool]]:
        """Id, commit, base and `by_base` of every usable adapter with a sketch, by commit, which is a draw."""
        with self._db.lock:
            rows = self._db.read().execute(
                'SELECT a.id, a."commit", a.base, s.by_base FROM sketches s '
                'JOIN adapters a ON a.key = s.adapter AND a."commit" = s."commit" '
                """WHERE a.status IN ('ok', 'quarantined') ORDER BY a."commit", a.id"""
            )
            return [(id, commit, base, bool(by_base)) for id, commit, base, by_base in rows.fetchall()]

    def _read(self, rest: str, values: Sequence[str | int]) -> dict[str, StoredSketch]:
        query = (
            "SELECT a.id, s.content, s.by_base, s.numbers FROM sketches s "
            f'JOIN adapters a ON a.key = s.adapter AND a."commit" = s."commit" {rest}'
        )
        with self._db.lock:
            rows = self._db.read().execute(query, clean(values)).fetchall()
        return {id: StoredSketch(content, bool(by_base), numbers) for id, content, by_base, numbers in rows}
