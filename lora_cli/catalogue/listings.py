"""How far the listings of a Hub were read, and which copies of a base have adapters."""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from lora_cli.catalogue.database import OpenDatabase
from lora_cli.catalogue.rows import clean

_KEEPS = timedelta(days=1)
_COPIES_KEEP = timedelta(days=7)


class Listings:
    """The listings of a catalogue: of a base at an endpoint, one for each name of the base. Times are UTC."""

    def __init__(self, db: OpenDatabase) -> None:
        self._db = db

    def next_page(self, endpoint: str, base: str, name: str) -> str:
        """The address of the first page that was not read, "" if there is none or it is older than a day."""
        with self._db.lock:
            found = self._db.read().execute(
                "SELECT next FROM listings WHERE endpoint = ? AND base = ? AND name = ? AND asked >= ?",
                clean([endpoint, base, name, _ago(_KEEPS)]),
            )
            row = found.fetchone()
        return str(row[0]) if row else ""

    def remember(self, endpoint: str, base: str, name: str, page: str) -> None:
        """Store the address of the page that comes next, "" at the end of a listing."""
        with self._db.writing() as db:
            db.execute(
                "INSERT OR REPLACE INTO listings (endpoint, base, name, next, asked) VALUES (?, ?, ?, ?, ?)",
                clean([endpoint, base, name, page, _ago(timedelta())]),
            )

    def copies(self, endpoint: str, base: str) -> list[str] | None:
        """The copies of a base that were found in the last week, None if nobody looked for them."""
        with self._db.lock:
            rows = self._db.read().execute(
                "SELECT name FROM listings WHERE endpoint = ? AND base = ? AND asked >= ? ORDER BY name",
                clean([f"{endpoint} copies", base, _ago(_COPIES_KEEP)]),
            )
            names = [row[0] for row in rows]
        return [name for name in names if name] if names else None

    def remember_copies(self, endpoint: str, base: str, names: Iterable[str]) -> None:
        """Replace the stored copies of a base."""
        place = f"{endpoint} copies"
        with self._db.writing() as db:
            db.execute("DELETE FROM listings WHERE endpoint = ? AND base = ?", clean([place, base]))
            for name in ("", *names):  # "" says that somebody looked
                db.execute(
                    "INSERT INTO listings (endpoint, base, name, asked) VALUES (?, ?, ?, ?)",
                    clean([place, base, name, _ago(timedelta())]),
                )


def _ago(time: timedelta) -> str:
    return (datetime.now(UTC) - time).isoformat(timespec="seconds")
