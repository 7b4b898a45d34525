"""The catalogue as others read it: its page names every table and column, and its queries give what they say."""

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from sqlite_utils import Database

from lora_cli.catalogue import runs
from lora_cli.catalogue.adapters import Catalogue
from lora_cli.catalogue.sql import query
from lora_cli.records import Adapter, Score
from tests.paths import ROOT

PAGE = (ROOT / "docs" / "catalogue.md").read_text(encoding="utf-8")
QUERIES = re.findall(r"\n([^\n]+):\n\n```sql\n(.*?)\n```", PAGE, re.DOTALL)
A, B = "a" * 40, "b" * 40


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Three adapters, one of them refused, a selection of an older commit, and one evaluation."""
    with Catalogue(tmp_path / "catalogue.db") as catalogue:
        one = Adapter(
            id="ann/one", commit=A, source="hub", repo="ann/one", author="ann", base="acme/base", rank=8, downloads=5,
            licence="mit", bytes=100, ranks={"q": 8, "v": 4}, datasets=("acme/poems",), card="Writes haiku.",
        )  # fmt: skip
        two = Adapter(
            id="bob/two",
            commit=B,
            source="hub",
            repo="bob/two",
            base="acme/base",
            downloads=9,
            bytes=50,
            ranks={"q": 2},
        )
        bad = Adapter(id="bob/bad", commit=A, source="hub", repo="bob/bad", status="unusable", reason="DoRA")
        catalogue.add([one, two, bad])
        catalogue.selections.remember("old", [(one, 1.0)], "rank", {})
        catalogue.add([Adapter(**{**{f: getattr(one, f) for f in one.__dataclass_fields__}, "commit": B})])
        db = catalogue.path
    with runs.recorded(
        db, "eval", {"data": "task.jsonl"}, {f"bob/two@{B}": "0" * 64, "task.jsonl": "1" * 64}, None
    ) as run:
        score = Score(system="two", metric="exact", value=0.5, low=0.4, high=0.6, n=100)
        runs.add_scores(db, run, [score], {"two": [f"bob/two@{B}"]}, "1" * 64)
    return db


def schema(path: Path) -> Iterator[tuple[str, set[str]]]:
    """Every table and view of the tool, with its columns."""
    with closing(sqlite3.connect(path)) as db:
        for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')").fetchall():
            if not re.match(r"sqlite_|_sqlite|adapters_fts_", name):
                yield name, {row[1] for row in db.execute(f"PRAGMA table_info({name})")}


def test_the_page_describes_every_table_view_and_column(path: Path) -> None:
    described = {
        name: set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`[^|]*) \|", text, re.MULTILINE))))
        for name, text in re.findall(r"\n### (\w+)\n(.*?)(?=\n##|\Z)", PAGE, re.DOTALL)
    }  # fmt: skip
    assert described == dict(schema(path))


def test_the_ten_queries_give_what_they_say(path: Path) -> None:
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as db:
        found = {title: db.execute(sql).fetchall() for title, sql in QUERIES}
    assert len(found) == 10
    rows = list(found.values())
    assert rows[0] == [("acme/base", "bob/two", 9), ("acme/base", "ann/one", 5)]
    assert rows[1] == [("DoRA", 1)]
    assert rows[2] == [("ann/one", "mit")]
    assert rows[3] == [("", 1, 50), ("mit", 1, 100)]
    assert rows[4] == [("acme/poems", 1)]
    assert rows[5] == [("bob/two", "exact", 0.5, 100)]
    assert rows[6] == [("ann/one",)]
    assert [(command, pinned) for _, command, pinned, _ in rows[7]] == [
        ("eval", f"bob/two@{B}"),
        ("eval", "task.jsonl"),
    ]
    assert rows[8] == [("old", 1, "ann/one")]
    assert rows[9] == [("q", 2, 2, 8), ("v", 1, 4, 4)]


def test_a_view_is_read_by_pool_sql_too(path: Path) -> None:
    assert query(path, QUERIES[5][1])[1] == [("bob/two", "exact", 0.5, 100)]


def test_sqlite_utils_finds_its_keys_and_its_search(path: Path) -> None:
    db = Database(path)
    keys = {
        (table, key.column, key.other_table)
        for table in ("selected", "scores", "spreads")
        for key in db.table(table).foreign_keys
    }
    assert keys == {
        ("selected", "selection_id", "selections"),
        ("scores", "run_id", "runs"),
        ("scores", "adapter", "adapters"),
        ("spreads", "adapter", "adapters"),
    }
    assert db.table("adapters").detect_fts() == "adapters_fts"
    assert [row["id"] for row in db.table("adapters").search("haiku")] == ["ann/one"]
    db.close()
