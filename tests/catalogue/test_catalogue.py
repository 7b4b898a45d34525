"""The catalogue: what goes in comes out, whoever else is writing, and whatever file it is given."""

import contextlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest

from lora_cli.catalogue import database, migrations
from lora_cli.catalogue.adapters import Catalogue
from lora_cli.catalogue.sql import query
from lora_cli.catalogue.sqlite import Database
from lora_cli.errors import DataError, NothingMatched, OutputError, UsageError
from lora_cli.records import Adapter, Candidates
from tests.paths import ROOT


def adapter(name: str, **facts: object) -> Adapter:
    return Adapter(id=name, commit="a" * 40, source="hub", repo=name, **facts)  # type: ignore[arg-type]


FULL = Adapter(
    id="alice/sql", commit="c" * 40, source="hub", repo="alice/sql", subfolder="x", author="alice",
    base_declared="Base", revision="v1", base="acme/base@v1", base_match="alias", peft_type="LORA", rank=8, alpha=16.0,
    scale=2.0, rslora=True, ranks={"layers.0.q_proj": 8}, target_modules=("q_proj", "v_proj"), modules=1, layers=1,
    dtype="BF16", parameters=64, bytes=999, sha256="d" * 64, hub_sha256="e" * 64, norm=1.5, licence="mit",
    datasets=("acme/questions",), downloads=7, likes=2,
    gated="auto", created_at="2026-01-01", modified_at="2026-01-02", card="Turns questions into SQL.", stamp="s",
    status="unusable", reason="no luck", notes="names repaired",
)  # fmt: skip


@pytest.fixture
def catalogue(tmp_path: Path) -> Iterator[Catalogue]:
    with Catalogue(tmp_path / "data" / "catalogue.db") as opened:
        yield opened


def whole(catalogue: Catalogue) -> list[Adapter]:
    """Every adapter of the catalogue with its ranks and its card."""
    return [catalogue.get(row.id) for row in catalogue.find()]


def test_every_fact_comes_back_as_it_was(catalogue: Catalogue) -> None:
    catalogue.add([FULL, adapter("bob/plain")])
    assert catalogue.get("alice/sql") == FULL
    assert catalogue.get("bob/plain") == adapter("bob/plain")
    assert all(getattr(FULL, f.name) != f.default for f in fields(Adapter)), "the example sets every field"


def test_adding_again_replaces_the_row(catalogue: Catalogue) -> None:
    catalogue.add([FULL])
    catalogue.add([replace(FULL, rank=4, card="Writes poems.")])
    assert whole(catalogue) == [replace(FULL, rank=4, card="Writes poems.")]
    assert catalogue.search("sql questions") == []
    assert [row.id for row in catalogue.search("poem")] == ["alice/sql"]


def test_reading_creates_nothing(catalogue: Catalogue) -> None:
    assert catalogue.find() == []
    assert catalogue.stats()["adapters"] == 0
    assert catalogue.selections.last() is None
    assert query(catalogue.path, "select count(*) n from adapters") == (["n"], [(0,)])
    assert not catalogue.path.parent.exists()


def test_an_unknown_id_names_those_that_look_like_it(catalogue: Catalogue) -> None:
    catalogue.add([adapter(name) for name in ("alice/sql-lora", "alice/math-lora", "bob/chat", "carol/sql-lora")])
    with pytest.raises(NothingMatched, match="alice/sql-lroa") as caught:
        catalogue.get("alice/sql-lroa")
    assert "did you mean alice/sql-lora" in caught.value.hint
    assert catalogue.suggest("sql-lora") == ["alice/sql-lora", "carol/sql-lora"]
    with pytest.raises(NothingMatched) as caught:
        catalogue.get("zzzzzz")
    assert "pool sync" in caught.value.hint


@pytest.mark.parametrize("text", ['"', "'", "*", "a AND", "NEAR(", "id:x", "-", "^a", "(", "\x00", "%", "a\ud800"])
def test_searching_has_no_language_of_its_own(catalogue: Catalogue, text: str) -> None:
    catalogue.add([FULL])
    with contextlib.suppress(UsageError):  # nothing left to search for
        assert [row.id for row in catalogue.search(text)] in ([], ["alice/sql"])


def test_the_best_match_comes_first(catalogue: Catalogue) -> None:
    catalogue.add([adapter("a/other", card="some sql here"), adapter("b/sql-expert"), adapter("c/none")])
    assert [row.id for row in catalogue.search("sql")] == ["b/sql-expert", "a/other"]


def test_selections_keep_order_scores_and_commits(catalogue: Catalogue) -> None:
    catalogue.add([adapter(f"a/{n}") for n in range(4)])
    rows = whole(catalogue)
    catalogue.selections.remember("first", [(rows[2], 0.5), (rows[0], None)], "cosine", {"k": 2})
    catalogue.selections.remember("", [(rows[1], 1.0)], "random", {"seed": 3})
    catalogue.add([replace(rows[2], commit="b" * 40)])
    last = catalogue.selections.last()
    assert last is not None
    assert (last.method, last.settings, [ref.id for ref in last.refs]) == ("random", {"seed": 3}, ["a/1"])
    first = catalogue.selections.last("first")
    assert first is not None
    assert [ref.pinned for ref in first.refs] == [f"a/2@{'a' * 40}", f"a/0@{'a' * 40}"]
    assert first.scores == (0.5, None)
    assert catalogue.selections.last("nothing") is None
    assert catalogue.provenance("a/2")["selections"] == ["first"]


def test_a_selection_of_an_adapter_that_is_gone_says_so(catalogue: Catalogue) -> None:
    catalogue.add([adapter("a/1"), adapter("a/2")])
    catalogue.selections.remember("", [(row, None) for row in whole(catalogue)], "random", {})
    # Another program, which knows no foreign keys.
    with contextlib.closing(sqlite3.connect(catalogue.path)) as other, other:
        other.execute("UPDATE selected SET adapter_id = 'a/gone' WHERE adapter_id = 'a/2'")
    with pytest.raises(NothingMatched, match="a/gone: not in the catalogue"):
        catalogue.selections.last()


@pytest.mark.parametrize("name", ["layers.0.q_proj", 'a "b" c', "a\\b", "ä,[1", ""])
def test_the_names_of_measured_modules_are_read_without_their_numbers(catalogue: Catalogue, name: str) -> None:
    catalogue.add([adapter("a/1"), adapter("a/2")])
    at = ("a/1", "a" * 40)
    catalogue.spreads.remember({at: {name: (1.5, float("nan"), 0.5), "other": (2.0, 0.1, 0.2)}})
    assert catalogue.spreads.modules([at, ("a/2", "a" * 40)]) == {"a/1": [*(catalogue.spreads.at(*at) or ())]}
    assert catalogue.spreads.modules([("a/1", "b" * 40)]) == {}


def test_what_weights_told_is_not_written_onto_another_commit(catalogue: Catalogue) -> None:
    catalogue.add([adapter("a/x")])
    row = catalogue.get("a/x")
    catalogue.learn(replace(row, sha256="1" * 64, norm=2.0))
    assert catalogue.get("a/x").norm == 2.0
    catalogue.learn(replace(row, commit="b" * 40, sha256="2" * 64, norm=9.0))
    assert catalogue.get("a/x").norm == 2.0


def test_stats_count_the_whole_catalogue(catalogue: Catalogue) -> None:
    catalogue.add([FULL, adapter("bob/x", rank=8, author="bob", bytes=1), adapter("bob/y", rank=4, author="bob")])
    figures = catalogue.stats()
    assert (figures["adapters"], figures["usable"], figures["bytes"], figures["authors"]) == (3, 2, 1000, 2)
    assert figures["by_status"] == {"ok": 2, "unusable": 1}
    assert figures["by_rank"] == {"4": 1, "8": 1}
    assert figures["by_reason"] == {"no luck": 1}


@pytest.mark.parametrize(
    "statement",
    [
        "delete from adapters", "update adapters set rank = 1", "insert into aliases values ('a', 'b')",
        "drop table adapters", "create table x (y)", "create temp table x (y)", "attach 'other.db' as o", "vacuum",
        "pragma journal_mode = delete", "pragma writable_schema = 1", "select load_extension('x')", "begin",
        "select 1; delete from adapters", "", "nonsense", "select nothing from adapters", "detach main",
        "with x as (select 1) delete from adapters", "explain delete from adapters", "reindex", "select readfile('/x')",
    ],
)  # fmt: skip
def test_sql_can_only_read(
    catalogue: Catalogue, statement: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    catalogue.add([FULL])
    with pytest.raises(UsageError):
        query(catalogue.path, statement)
    assert whole(catalogue) == [FULL]
    assert not (tmp_path / "other.db").exists()


def test_sql_reads_columns_the_index_and_lists(catalogue: Catalogue) -> None:
    catalogue.add([FULL, adapter("bob/x")])
    assert query(catalogue.path, "select id, rank from adapters order by id") == (
        ["id", "rank"],
        [("alice/sql", 8), ("bob/x", None)],
    )
    assert query(catalogue.path, "select count(*) from adapters_fts where adapters_fts match 'sql'")[1] == [(1,)]
    assert query(catalogue.path, "select value from adapters, json_each(target_modules)")[1] == [
        ("q_proj",),
        ("v_proj",),
    ]
    with pytest.raises(UsageError) as caught:
        query(catalogue.path, "select commit from adapters")
    assert "double quotes" in caught.value.hint


@pytest.mark.parametrize("content", [b"not a database at all, but text", b"SQLite format 3\x00 and then rubbish" * 40])
def test_a_file_that_is_no_catalogue_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    for act in (lambda c: c.find(), lambda c: c.add([FULL])):
        with Catalogue(path) as catalogue, pytest.raises(DataError, match=r"notes\.txt"):
            act(catalogue)
    assert path.read_bytes() == content


def test_another_programs_database_is_refused(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "bank.db")
    connection.execute("create table accounts (owner)")
    connection.close()
    with Catalogue(tmp_path / "bank.db") as catalogue, pytest.raises(DataError, match="another program"):
        catalogue.add([FULL])
    with Catalogue(tmp_path) as catalogue, pytest.raises(DataError, match="a folder"):
        catalogue.find()


def test_a_catalogue_of_a_newer_version_is_refused(catalogue: Catalogue) -> None:
    catalogue.add([FULL])
    catalogue.close()
    connection = sqlite3.connect(catalogue.path)
    connection.execute("insert into _sqlite_migrations (migration_set, name, applied_at) values ('lora', 'm999_x', '')")
    connection.commit()
    connection.close()
    for act in (lambda: catalogue.find(), lambda: catalogue.add([FULL])):
        with pytest.raises(DataError, match="newer version of lora"):
            act()


def test_an_older_catalogue_is_copied_before_it_is_changed(
    catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue.add([FULL])
    catalogue.close()

    def m999_colour(db: Database) -> None:
        db.execute("ALTER TABLE adapters ADD COLUMN colour TEXT")

    monkeypatch.setattr(migrations, "STEPS", (*migrations.STEPS, m999_colour))
    assert whole(catalogue) == [FULL]
    assert "colour" in query(catalogue.path, "select * from adapters")[0]
    [backup] = catalogue.path.parent.glob("*.backup")
    connection = sqlite3.connect(backup)
    assert connection.execute("select id from adapters").fetchall() == [("alice/sql",)]
    connection.close()


def test_rows_of_an_older_catalogue_are_made_thin_without_a_loss(
    catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = migrations.STEPS
    monkeypatch.setattr(migrations, "STEPS", every[:2])
    catalogue.path.parent.mkdir(exist_ok=True)
    columns = [f.name for f in fields(Adapter) if f.name not in ("datasets", "hub_sha256")]
    with contextlib.closing(Database(sqlite3.connect(catalogue.path, isolation_level=None))) as db:
        migrations.migrations().apply(db)
        for number, one in enumerate((FULL, adapter("bob/plain", card="Writes poems."))):
            stored = {**asdict(one), "ranks": json.dumps(one.ranks), "target_modules": json.dumps(one.target_modules)}
            names = ", ".join(f'"{name}"' for name in columns)
            values = [number + 7, *(stored[name] for name in columns)]
            db.execute(f"INSERT INTO adapters (key, {names}) VALUES ({', '.join('?' * len(values))})", values)
    monkeypatch.setattr(migrations, "STEPS", every)
    assert whole(catalogue) == [replace(FULL, datasets=(), hub_sha256=""), adapter("bob/plain", card="Writes poems.")]
    assert [row.id for row in catalogue.search("poems")] == ["bob/plain"]
    catalogue.add([replace(FULL, card="Writes novels.")])
    assert [row.id for row in catalogue.search("novels")] == ["alice/sql"]
    assert query(catalogue.path, "select key, rank_total from adapters order by key")[1] == [(7, 8), (8, 0)]


def test_what_selection_reads_is_in_an_index_and_lists_leave_out_what_is_long(catalogue: Catalogue) -> None:
    catalogue.add([replace(FULL, status="ok"), adapter("bob/plain", base="acme/base@v1"), adapter("bob/other")])
    seen: list[str] = []
    reader = catalogue._db.read()
    reader.conn.set_trace_callback(seen.append)
    found = catalogue.candidates(["author", "rank_total", "downloads", "likes"], base="acme/base@v1")
    catalogue.find(["rank<=8"], sort="-downloads", limit=1)
    reader.conn.set_trace_callback(None)
    pinned = (f"alice/sql@{'c' * 40}", f"bob/plain@{adapter('bob/plain').commit}")
    facts = {"author": ("alice", ""), "rank_total": (8, 0), "downloads": (7, 0), "likes": (2, 0)}
    assert found == Candidates(pinned, facts, {"acme/base@v1": 2})
    for one in [one for one in seen if "EXISTS" not in one][:2]:
        plan = reader.execute(f"EXPLAIN QUERY PLAN {one}").fetchall()[0][-1]
        assert "COVERING INDEX" in plan
    assert not any("card" in query or "ranks" in query for query in seen)


def test_a_mistyped_id_is_recognised_in_a_large_pool(catalogue: Catalogue) -> None:
    catalogue.add([adapter(f"author{n % 7}/adapter-{n:05d}") for n in range(21_000)])
    assert catalogue.suggest("author3/adpater-20919")[0] == "author3/adapter-20919"
    assert catalogue.suggest("nobody/ADAPTER-20999")[0] == "author6/adapter-20999"
    assert catalogue.suggest("zzz") == []


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with Catalogue(tmp_path / "file" / "catalogue.db") as catalogue, pytest.raises(OutputError, match="cannot be"):
        catalogue.add([FULL])


def test_a_lock_that_is_never_given_back_is_said(catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue.add([FULL])
    catalogue.close()
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.2)
    other = sqlite3.connect(catalogue.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(OutputError, match="another lora"):
        catalogue.add([FULL])
    assert whole(catalogue) == [FULL], "readers need not wait for writers"
    other.close()


WRITER = """
import sys
from pathlib import Path
from lora_cli.catalogue.adapters import Catalogue
from lora_cli.records import Adapter
with Catalogue(Path(sys.argv[1])) as catalogue:
    for n in range(int(sys.argv[3])):
        catalogue.add([Adapter(id=f"{sys.argv[2]}/{n}-{half}", commit="a" * 40, source="hub", repo="x", rank=n)
                       for half in (0, 1)])
"""


def writers(path: Path, count: int, each: int) -> list[subprocess.Popen[bytes]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), f"w{n}", str(each)], env=environment)
        for n in range(count)
    ]


def test_writers_wait_for_each_other_even_for_the_first_write(tmp_path: Path) -> None:
    running = writers(tmp_path / "shared.db", 4, 40)
    assert [process.wait() for process in running] == [0, 0, 0, 0]
    with Catalogue(tmp_path / "shared.db") as catalogue:
        assert len(catalogue.find()) == 4 * 40 * 2


@pytest.mark.slow
def test_writers_killed_at_any_moment_leave_whole_batches(tmp_path: Path) -> None:
    path = tmp_path / "killed.db"
    chance = random.Random(3)
    for _ in range(4):
        running = writers(path, 2, 100_000)
        deadline = time.monotonic() + 20
        size = path.stat().st_size if path.exists() else 0
        while not (path.exists() and path.with_name("killed.db-wal").exists()) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(chance.uniform(0.05, 0.4))
        for process in running:
            process.send_signal(signal.SIGKILL)
            process.wait()
        connection = sqlite3.connect(path)
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        connection.close()
        assert path.stat().st_size >= size
    with Catalogue(path) as catalogue:
        rows = catalogue.find(["id~-0"])
        assert len(rows) == len(catalogue.find(["id~-1"])) > 0
        assert len(catalogue.search("w0")) > 0
