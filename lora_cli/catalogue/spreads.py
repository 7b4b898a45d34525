"""The spreads of updates that `verify --deep` measured, and the quarantine that it may put adapters in."""

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from sys import intern

from lora_cli.catalogue.database import OpenDatabase
from lora_cli.catalogue.rows import clean

_BATCH = 300  # pairs per statement, below SQLite's limit on parameters

Modules = Mapping[str, tuple[float, ...]]
"""The numbers of each module of an adapter; NaN where there is none."""


class Spreads:
    """The measured adapters of a catalogue. A measure counts only as long as its adapter has the same commit."""

    def __init__(self, db: OpenDatabase) -> None:
        self._db = db

    def remember(self, measured: Mapping[tuple[str, str], Modules]) -> None:
        """Store the measures of adapters by id and commit; those that are not in the catalogue are left out."""
        with self._db.writing() as db:
            for (id, commit), modules in measured.items():
                db.execute(
                    'INSERT OR REPLACE INTO spreads (adapter, "commit", modules) '
                    'SELECT key, "commit", ? FROM adapters WHERE id = ? AND "commit" = ?',
                    [_packed(modules), *clean([id, commit])],
                )

    def at(self, id: str, commit: str) -> Modules | None:
        """The measures of one adapter at one commit, None if there are none."""
        with self._db.lock:
            row = (
                self._db.read()
                .execute(
                    'SELECT s.modules FROM spreads s JOIN adapters a ON a.key = s.adapter AND a."commit" = s."commit" '
                    'WHERE a.id = ? AND a."commit" = ?',
                    clean([id, commit]),
                )
                .fetchone()
            )
        return None if row is None else _unpacked(row[0])

    def modules(self, adapters: Sequence[tuple[str, str]]) -> dict[str, Sequence[str]]:
        """The names of the modules, by id, of those given by id and commit that were measured."""
        found: dict[str, Sequence[str]] = {}
        for start in range(0, len(adapters), _BATCH):
            batch = adapters[start : start + _BATCH]
            marks = ", ".join(["(?, ?)"] * len(batch))
            query = (
                "SELECT a.id, s.modules FROM spreads s "
                'JOIN adapters a ON a.key = s.adapter AND a."commit" = s."commit" '
                f'WHERE (a.id, a."commit") IN (VALUES {marks})'
            )
            with self._db.lock:
                rows = self._db.read().execute(query, clean([text for one in batch for text in one])).fetchall()
            found |= {id: names for id, packed in rows if (names := _names(packed)) is not None}
        return found

    def of(self, base: str, *, most: int = 500, with_: Iterable[str] = ()) -> dict[str, Modules]:
        """The measures of usable adapters of a base, by id.

        Of more than `most`, those whose commits come first are taken, which is a draw, and those with the ids `with_`.
        1,000 adapters of an 8B model take 140 MB.
        """
        measured = (
            'SELECT id, s.modules FROM spreads s JOIN adapters a ON a.key = s.adapter AND a."commit" = s."commit" '
            "WHERE base = ? AND status IN ('ok', 'quarantined')"
        )
        with self._db.lock:
            db = self._db.read()
            rows = db.execute(f'{measured} ORDER BY a."commit", id LIMIT ?', clean([base, most])).fetchall()
            for id in with_:
                rows += db.execute(f"{measured} AND id = ?", clean([base, id])).fetchall()
        found = {id: _unpacked(packed) for id, packed in sorted(rows)}
        return {id: modules for id, modules in found.items() if modules is not None}

    def quarantine(self, reasons: Mapping[tuple[str, str], str]) -> None:
        """Set the quarantine of usable adapters by id and commit, each with its reason; lift it where that is ""."""
        with self._db.writing() as db:
            for (id, commit), reason in reasons.items():
                was = "status IN ('ok', 'quarantined')" if reason else "status = 'quarantined'"
                db.execute(
                    f'UPDATE adapters SET status = ?, reason = ? WHERE id = ? AND "commit" = ? AND {was}',
                    clean(["quarantined" if reason else "ok", reason, id, commit]),
                )


def _packed(modules: Modules) -> bytes:
    """JSON, compressed: 224 modules of an adapter take 4 kB."""
    numbers = {name: [None if x != x else float(f"{x:.8g}") for x in values] for name, values in modules.items()}
    return zlib.compress(json.dumps(numbers, separators=(",", ":")).encode())


def _unpacked(packed: bytes) -> Modules | None:
    """The measures in a cell; None for one that is damaged, whose adapter then counts as not measured."""
    nan = float("nan")
    try:
        found = json.loads(zlib.decompress(packed))
        return {intern(name): tuple([nan if x is None else float(x) for x in values]) for name, values in found.items()}
    except (zlib.error, ValueError, TypeError, AttributeError):
        return None


def _names(packed: bytes) -> Sequence[str] | None:
    """The names in a cell; None for one that is damaged."""
    try:
        text = zlib.decompress(packed).decode()
        # Numbers are most of it. Without an escape, what is between quotes are the names.
        return [*json.loads(text)] if "\\" in text else text.split('"')[1::2]
    except (zlib.error, ValueError, TypeError):
        return None
