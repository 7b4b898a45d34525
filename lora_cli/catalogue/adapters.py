"""The catalogued adapters: one SQLite file, safe to kill and to share."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from lora_cli.catalogue import verdicts
from lora_cli.catalogue.database import OpenDatabase
from lora_cli.catalogue.listings import Listings
from lora_cli.catalogue.rows import Known, clean, most_frequent, parsed, quoted, uncollected
from lora_cli.catalogue.selections import Selections
from lora_cli.catalogue.sketches import Sketches
from lora_cli.catalogue.spreads import Spreads
from lora_cli.catalogue.sqlite import Database
from lora_cli.catalogue.where import columns_in, conditions, ordering, sort_column
from lora_cli.errors import NothingMatched, UsageError
from lora_cli.names import ids_and_commits, is_commit
from lora_cli.records import Adapter, AdapterRow, Candidates, ReportedAdapter
from lora_cli.settings import folder_of
from lora_cli.text import meant

R = TypeVar("R", Adapter, AdapterRow)
_FOUND = (
    "JOIN (SELECT rowid AS found, bm25(adapters_fts, 8, 4, 2, 1) AS place "
    "FROM adapters_fts WHERE adapters_fts MATCH ?) ON key = found"
)
_BATCH = 400  # ids per statement, below SQLite's limit on parameters


_KNOWN = quoted(["id", *Known._fields])


class Catalogue:
    """The catalogue at `path`. Nothing is created before the first write; reading cannot change the file.

    One object may be used by several threads, and the file by several processes: every write is one transaction.
    Methods raise DataError for a file that is no catalogue and OutputError for one that cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._db = OpenDatabase(path)
        self.selections = Selections(self._db, self.get)
        self.spreads = Spreads(self._db)
        self.listings = Listings(self._db)
        self.bases = verdicts.Bases(self._db)
        self.sketches = Sketches(self._db)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        self._db.close()

    def add(self, adapters: Iterable[Adapter], hub_ids: Mapping[str, str] | None = None, *, base: str = "") -> None:
        """Store adapters by id, as judged for `base` ("" for any), in one transaction; an earlier verdict is replaced.

        Verdicts for other bases stay. `hub_ids` maps an id to the Hub's own stable id of the repository: a row of that
        repository is renamed.
        """
        seen = datetime.now(UTC).isoformat(timespec="seconds")
        with self._db.writing() as db:
            for adapter in adapters:
                hub_id = (hub_ids or {}).get(adapter.id, "")
                if hub_id:
                    self._follow_rename(db, adapter, hub_id)
                verdicts.put(db, adapter, base, hub_id, seen)

    def refresh(self, popularity: Mapping[str, tuple[int, int]]) -> None:
        """Set downloads and likes, which change from day to day even if the adapter does not."""
        with self._db.writing() as db:
            for id, (downloads, likes) in popularity.items():
                db.execute("UPDATE adapters SET downloads = ?, likes = ? WHERE id = ?", [downloads, likes, id])

    def learn(self, adapter: Adapter) -> None:
        """Store the facts from reading the weights; ignored if the row is at another commit by now."""
        with self._db.writing() as db:
            verdicts.learn(db, adapter)

    def mark(self, ids: Iterable[str], status: str, reason: str, *, base: str | None = None) -> None:
        """Give adapters another status, with its reason, for `base` or for every base."""
        with self._db.writing() as db:
            for id in ids:
                verdicts.set_status(db, id, status, reason, base)

    def known(self, ids: Sequence[str] | None = None, *, base: str | None = None) -> dict[str, Known]:
        """The stored version and status of these ids (all ids by default), as judged for `base` if it is given.

        Ids without such a verdict are left out.
        """
        with self._db.lock:
            db = self._db.read()
            table, test, given = _shown(db, base, Known._fields)
            columns = f"SELECT {_KNOWN} FROM {table} WHERE {test}"
            if ids is None:
                rows = db.execute(columns, [*given]).fetchall()
            else:
                rows = []
                for start in range(0, len(ids), _BATCH):
                    batch = clean(ids[start : start + _BATCH])
                    marks = ", ".join("?" * len(batch))
                    rows += db.execute(f"{columns} AND id IN ({marks})", [*given, *batch]).fetchall()
        return {id: Known(*values) for id, *values in rows}

    def get(self, id: str, *, base: str | None = None) -> Adapter:
        """The adapter with this id, as judged for `base` if it was. NothingMatched, with similar ids, for none."""
        with self._db.lock:
            rows = self._rows(Adapter, "id = ?", [id], base=base) or self._rows(Adapter, "id = ?", [id])
        if rows:
            return rows[0]
        near = self.suggest(id)
        hint = meant(near, "see `lora pool list`, or run `lora pool sync`")
        raise NothingMatched(f"{id}: not in the catalogue", hint=hint)

    def named(self, text: str, *, base: str | None = None) -> Adapter:
        """The row for the user's text: an id (with `@commit` only that version), or a folder; as judged for `base`.

        Raises:
            NothingMatched: no such row, with similar ids; or the row is at another commit.
        """
        folder = folder_of(text) if text.startswith((".", "/", "~")) else None
        if folder is not None and (found := self.at(folder)) is not None:
            return found
        readings = ids_and_commits(text)
        known = self.known([id for id, _ in readings])
        fitting = [(id, commit) for id, commit in readings if id in known and known[id].commit.startswith(commit)]
        if not fitting and folder is not None:
            raise NothingMatched(
                f"{text}: not in the catalogue", hint=f"lora pool verify {text} checks a folder without a sync"
            )
        id, commit = [*fitting, *readings][0]
        if len(fitting) > 1 and not is_commit(commit):
            raise NothingMatched(
                f"{text} is the name of one adapter and the commit of another",
                hint=f"give all 40 digits of a commit: {id}@{known[id].commit} or {text}@{known[text].commit}",
            )
        row = self.get(id, base=base)
        if not row.commit.startswith(commit):
            raise NothingMatched(
                f"{row.id} is at commit {row.commit[:12]} in the catalogue; commit {commit} is not available here",
                hint=f"drop @{commit} to use it as it is, or run lora select again",
            )
        return row

    def at(self, folder: Path) -> Adapter | None:
        """The adapter in `folder`, None if it is not in the catalogue."""
        with self._db.lock:
            rows = self._rows(Adapter, "source = 'folder' AND repo = ?", [str(folder.resolve())])
        return rows[0] if rows else None

    def provenance(self, id: str) -> dict[str, Any]:
        """The time of a row's last write, the Hub's own id of its repository, and the selections that hold it."""
        with self._db.lock:
            db = self._db.read()
            found = db.execute("SELECT hub_id, seen_at FROM adapters WHERE id = ?", [id]).fetchone() or ("", "")
            selections = db.execute(
                "SELECT s.id, s.name FROM selected JOIN selections s ON s.id = selection_id WHERE adapter_id = ? "
                "ORDER BY s.id DESC LIMIT 20",
                [id],
            )
            names = [name or f"#{number}" for number, name in selections]
        return {"hub_id": found[0], "stored_at": found[1], "selections": names}

    def suggest(self, id: str, count: int = 3) -> list[str]:
        """Ids similar to `id`, the likeliest first: of the same name, or spelled alike."""
        from rapidfuzz import fuzz, process

        wanted = id.lower()
        with self._db.lock:
            ids = [row[0] for row in self._db.read().execute("SELECT id FROM adapters ORDER BY id")]
        lowered = [known.lower() for known in ids]
        name = "/" + wanted.rpartition("/")[2]
        same = [known for known, low in zip(ids, lowered, strict=True) if low.endswith(name)]
        alike = process.extract(wanted, lowered, scorer=fuzz.ratio, score_cutoff=70, limit=count)
        return list(dict.fromkeys([*same, *(ids[place] for _, _, place in alike)]))[:count]

    def ids_from(self, start: str, limit: int) -> list[str]:
        """The first ids with the prefix `start`, in alphabetical order."""
        with self._db.lock:
            rows = self._db.read().execute(
                "SELECT id FROM adapters WHERE id >= ? AND substr(id, 1, ?) = ? ORDER BY id LIMIT ?",
                [*clean([start]), len(start), *clean([start]), limit],
            )
            return [row[0] for row in rows]

    def values_of(self, column: str, start: str, limit: int) -> list[str]:
        """The values of a column with the prefix `start`, the most frequent first."""
        name = quoted([column])
        with self._db.lock:
            rows = self._db.read().execute(
                f"SELECT {name} FROM adapters WHERE {name} != '' AND substr({name}, 1, ?) = ? "
                "GROUP BY 1 ORDER BY count(*) DESC, 1 LIMIT ?",
                [len(start), *clean([start]), limit],
            )
            return [str(row[0]) for row in rows]

    def remove(self, ids: Sequence[str]) -> None:
        """Delete the rows of adapters, also from selections; their files stay."""
        with self._db.writing() as db:
            for id in ids:
                db.execute("DELETE FROM selected WHERE adapter_id = ?", [id])
                db.execute("DELETE FROM adapters WHERE id = ?", [id])

    def find(
        self,
        where: Sequence[str] = (),
        *,
        base: str | None = None,
        sort: str = "id",
        limit: int | None = None,
        status: str | None = None,
    ) -> list[AdapterRow]:
        """Adapters for which every condition of `where` holds (see `where`), and the status if one is given.

        With a `base`, the adapters that were judged for it, as they were; else all, each as its row has it.
        """
        test, values = _tested(where, status)
        most = -1 if limit is None else limit
        with self._db.lock:
            # Choose rows by what the conditions and the order name, so that only those asked for are read in full.
            table, of_base, given = _shown(self._db.read(), base, ["status", sort_column(sort), *columns_in(where)])
            query = f"SELECT id FROM {table} WHERE {of_base} AND {test} ORDER BY {ordering(sort)} LIMIT ?"
            found = self._db.read().execute(query, clean([*given, *values, most])).fetchall()
            return self.rows([id for (id,) in found], base=base)

    def rows(self, ids: Sequence[str], *, base: str | None = None) -> list[AdapterRow]:
        """The adapters with these ids, in this order, as judged for `base` if it is given; without those not there."""
        found: dict[str, AdapterRow] = {}
        with self._db.lock:
            for start in range(0, len(ids), _BATCH):
                batch = ids[start : start + _BATCH]
                # By their keys: the rows of another base have no index by id.
                keys = f"SELECT key FROM adapters WHERE id IN ({', '.join('?' * len(batch))})"
                found |= {row.id: row for row in self._rows(AdapterRow, f"key IN ({keys})", batch, base=base)}
        return [found[id] for id in ids if id in found]

    def candidates(
        self, facts: Sequence[str] = (), where: Sequence[str] = (), *, base: str | None = None
    ) -> Candidates:
        """The usable adapters for which every condition of `where` holds, of `base` if given; by id."""
        test, values = _tested(where, "ok")
        columns = ", ".join(["""id || '@' || "commit\"""", *([quoted(facts)] if facts else [])])
        with self._db.lock, uncollected():
            db = self._db.read()
            table, of_base, given = _shown(db, base, ["commit", "base", "status", *columns_in(where), *facts])
            if base is not None:
                # Usable adapters are for the base they were judged for, and an index begins with it.
                of_base, given = ("base = ?", [base]) if table == "adapters" else ("base = ?", [*given, base])
            test, values = f"{of_base} AND {test}", clean([*given, *values])
            # One call for all rows: each step of the cursor would pass through its translation of errors.
            rows = db.execute(f"SELECT {columns} FROM {table} WHERE {test} ORDER BY base, id", values).fetchall()
            counts = f"SELECT base, count(*) FROM {table} WHERE {test} GROUP BY base ORDER BY 2 DESC, 1"
            bases = dict(db.execute(counts, values).fetchall()) if base is None else {base: len(rows)} if rows else {}
            pinned, *columns_read = zip(*rows, strict=True) if rows else [()] * (1 + len(facts))
        return Candidates(pinned, dict(zip(facts, columns_read, strict=True)), bases)

    def reported(self, where: Sequence[str] = (), *, base: str | None = None) -> list[ReportedAdapter]:
        """The adapters for which every condition of `where` holds, the most downloaded first, then by id."""
        test, values = _tested(where, None)
        with self._db.lock:
            db = self._db.read()
            table, of_base, given = _shown(db, base, [*ReportedAdapter._fields, *columns_in(where)])
            columns = quoted(ReportedAdapter._fields)
            rows = f"SELECT {columns} FROM {table} WHERE {of_base} AND {test} ORDER BY downloads DESC, id"
            return list(map(ReportedAdapter._make, db.execute(rows, clean([*given, *values]))))

    def last_sync(self) -> str:
        """The time at which the last sync ended, "" if there was none."""
        with self._db.lock:
            return self._db.read().execute("SELECT max(ended) FROM syncs").fetchone()[0] or ""

    def search(self, text: str, *, base: str | None = None, limit: int = 50) -> list[AdapterRow]:
        """Adapters whose id, author, modules or card hold every word of `text` (or a word that starts so), best first.

        Punctuation in `text` only separates words: there is no query language.
        """
        words = re.findall(r"\w+", text.replace("_", " "))
        if not words:
            raise UsageError(f"nothing to search for in {text!r}", hint="give a word or two")
        query = " ".join(f'"{word}"*' for word in words[:20])
        with self._db.lock:
            db = self._db.read()
            table, of_base, given = _shown(db, base, [])
            values = [query, *given] if table == "adapters" else [*given, query]
            found = f"SELECT id FROM {table} {_FOUND} WHERE {of_base} ORDER BY place, id LIMIT ?"
            return self.rows([id for (id,) in db.execute(found, [*values, limit]).fetchall()], base=base)

    def stats(self, *, base: str | None = None) -> dict[str, Any]:
        """Counts of the whole catalogue, or of what was judged for `base`.

        By status, base, rank, licence, author, data type and reason.
        """
        with self._db.lock:
            db = self._db.read()
            names = ("status", "base", "rank", "licence", "author", "dtype", "reason")
            table, of_base, given = _shown(db, base, [*names, "bytes"])
            listed = quoted(names)
            query = f"SELECT {listed}, count(*), sum(bytes) FROM {table} WHERE {of_base} GROUP BY {listed}"
            rows = db.execute(query, [*given]).fetchall()
        counts: dict[str, Counter[Any]] = {name: Counter() for name in names}
        for *values, count, _ in rows:
            for name, value in zip(names, values, strict=True):
                if value if name == "reason" else values[0] == "ok" or name not in ("rank", "dtype"):
                    counts[name][value] += count
        figures = {
            "adapters": sum(row[-2] for row in rows),
            "bytes": sum(row[-1] for row in rows),
            "authors": len(counts["author"].keys() - {""}),
            "usable": counts["status"]["ok"],
        }
        ranked = {f"by_{name}": most_frequent(counts[name], 20 if name == "rank" else 10) for name in names}
        return {**figures, **ranked, "last_sync": self.last_sync() or None}

    def ids_of(self, *, source: str, base: str = "", at: Sequence[str] | None = None, gone: bool = False) -> list[str]:
        """Ids of rows that are not gone, from one source or of one base: a sync checks these for deletions.

        `gone` adds the gone ones; `at` names at most 400 places, whose gone rows count too.
        """
        tests, values = ["source = ?"], [source]
        if at is not None:
            tests, values = [*tests, f"repo IN ({', '.join('?' * len(at))})"], [*values, *clean(at)]
        elif not gone:
            tests = [*tests, "status != 'gone'"]
        with self._db.lock:
            db = self._db.read()
            table, of_base, given = _shown(db, base, ["source", "status", "repo"])
            query = f"SELECT id FROM {table} WHERE {' AND '.join([of_base, *tests])} ORDER BY id"
            return [row[0] for row in db.execute(query, [*given, *values])]

    def remember_sync(self, started: str, source: str, base: str, report: Mapping[str, Any]) -> None:
        """Store the figures of one sync."""
        with self._db.writing() as db:
            db.execute(
                "INSERT INTO syncs (started, ended, source, base, report) VALUES (?, ?, ?, ?, ?)",
                [started, datetime.now(UTC).isoformat(timespec="seconds"), source, base, json.dumps(dict(report))],
            )

    def aliases(self) -> dict[str, str]:
        """Every remembered other name of a base model, with its base."""
        with self._db.lock:
            return dict(self._db.read().execute("SELECT alias, base FROM aliases ORDER BY alias").fetchall())

    def remember_aliases(self, base: str, aliases: Iterable[str]) -> None:
        """Replace the stored other names of a base model."""
        with self._db.writing() as db:
            db.execute("DELETE FROM aliases WHERE base = ?", [base])
            for alias in aliases:
                db.execute("INSERT OR REPLACE INTO aliases (alias, base) VALUES (?, ?)", [alias, base])

    def _rows(self, kind: type[R], rest: str, values: Sequence[Any], *, base: str | None = None) -> list[R]:
        """Rows as records of `kind`: those for which `rest` holds, a condition and what may follow it."""
        names = [field.name for field in fields(kind)]
        db = self._db.read()
        of: verdicts.Shown = _shown(db, base, names)
        query = f"SELECT {quoted(names)} FROM {of.table} WHERE {of.test} AND {rest}"
        rows = db.execute(query, clean([*of.values, *values]))
        return [kind(**parsed(dict(zip(names, row, strict=True)))) for row in rows]

    @staticmethod
    def _follow_rename(db: Database, adapter: Adapter, hub_id: str) -> None:
        same = "hub_id = ? AND subfolder = ? AND id != ?"
        which = [hub_id, adapter.subfolder, adapter.id]
        db.execute(
            f"UPDATE selected SET adapter_id = ? WHERE adapter_id IN (SELECT id FROM adapters WHERE {same})",
            [adapter.id, *which],
        )
        db.execute(f"UPDATE OR REPLACE adapters SET id = ? WHERE {same}", [adapter.id, *which])


def _shown(db: Database, base: str | None, columns: Sequence[str]) -> verdicts.Shown:
    """The rows of a base, each adapter's own row for None or ""."""
    return verdicts.shown(db, base, columns) if base else verdicts.EVERY


def _tested(where: Sequence[str], status: str | None) -> tuple[str, list[Any]]:
    """The SQL of conditions and of a status, and its values."""
    test, values = conditions(where)
    return (test, [*values]) if status is None else (f"({test}) AND status = ?", [*values, status])
