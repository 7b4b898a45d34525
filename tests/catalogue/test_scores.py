"""The scores of the catalogue: those of evaluations and of imports, and which of them count."""

import json
import os
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from lora_cli.catalogue import doctor, migrations, runs
from lora_cli.catalogue.adapters import Catalogue
from lora_cli.catalogue.dump import scores_of
from lora_cli.catalogue.sql import query
from lora_cli.catalogue.sqlite import Database
from lora_cli.records import Adapter, Score
from tests.cli import ok

ANN = Adapter(id="ann/sql@v1:x", commit="a" * 40, source="hub", repo="ann/sql")
TASK = "f" * 64


def score(system: str, value: float) -> Score:
    return Score(system=system, metric="exact", value=value, low=0, high=1, n=4)


def evaluated(db: Path, value: float, commit: str = ANN.commit) -> str:
    """An evaluation of the base, of one adapter and of two; returns its run."""
    adapters = {"one": [f"{ANN.id}@{commit}"], "two": [f"{ANN.id}@{commit}", f"bob/x@{'b' * 40}"]}
    with runs.recorded(db, "eval", {"data": "test.jsonl"}, {}, None) as run:
        runs.add_scores(db, run, [score(name, value) for name in ("base", "one", "two")], adapters, TASK)
    return run.id


@pytest.fixture
def db(own_home: Path) -> Path:
    path = Path(os.environ["LORA_DB"])
    with Catalogue(path) as catalogue:
        catalogue.add([ANN])
    return path


def test_the_newest_score_of_an_adapter_alone_counts_at_its_version(db: Path) -> None:
    evaluated(db, 0.25)
    evaluated(db, 0.5)
    evaluated(db, 0.75, commit="e" * 40)
    assert query(db, "select id, task, value, n, imported from adapter_scores")[1] == [
        (ANN.id, "test.jsonl@ffffffff", 0.5, 4, 0)
    ]
    with Catalogue(db) as catalogue:
        catalogue.add([replace(ANN, commit="e" * 40)])
        assert scores_of(db, ANN.id) == {"exact": {"test.jsonl@ffffffff": 0.75}}
    Path("s.csv").write_text(f"adapter,test.jsonl@ffffffff\n{ANN.id},0.125\n")
    ok("pool", "import", "s.csv", "--metric", "exact")
    ok("pool", "import", "s.csv", "--metric", "exact")
    assert query(db, "select value, imported from adapter_scores")[1] == [(0.125, 1)]


def test_scores_follow_a_rename_and_end_with_their_adapter_unless_a_run_computed_them(db: Path) -> None:
    run = evaluated(db, 0.5)
    Path("s.csv").write_text(f"adapter,x\n{ANN.id},1\n")
    ok("pool", "import", "s.csv")
    with Catalogue(db) as catalogue:
        catalogue.add([ANN], {ANN.id: "hub-1"})
        catalogue.add([replace(ANN, id="ann/new", repo="ann/new")], {"ann/new": "hub-1"})
        assert scores_of(db, "ann/new") == {"exact": {"test.jsonl@ffffffff": 0.5}, "score": {"x": 1}}
        catalogue.remove(["ann/new"])
    assert query(db, "select system, adapter, imported from scores")[1] == [
        ("base", None, 0), ("one", None, 0), ("two", None, 0),
    ]  # fmt: skip
    assert [found["system"] for found in runs.find(db, run)["scores"]] == ["base", "one", "two"]


def test_scores_of_an_older_catalogue_get_their_adapter_and_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, every = tmp_path / "old.db", migrations.STEPS
    monkeypatch.setattr(migrations, "STEPS", every[:4])
    record = json.dumps({"settings": {"data": "old.jsonl"}})
    with closing(Database(sqlite3.connect(path, isolation_level=None))) as old:
        migrations.migrations().apply(old)
        columns = 'INSERT INTO adapters (id, "commit", source, repo) VALUES (?, ?, ?, ?)'
        old.execute(columns, [ANN.id, ANN.commit, ANN.source, ANN.repo])
        old.execute("INSERT INTO runs VALUES ('r', 'eval', 'done', '', '', '', ?, '')", [record])
        for system, adapters in {
            "base": [],
            "one": [ANN.ref.pinned],
            "dir": ["merged"],
            "two": [ANN.ref.pinned] * 2,
        }.items():
            old.execute(
                "INSERT INTO scores (run_id, system, adapters, task_sha256, metric, value) VALUES ('r', ?, ?, ?, ?, 1)",
                [system, json.dumps(adapters), TASK, "exact"],
            )
    monkeypatch.setattr(migrations, "STEPS", every)
    rows = query(path, 'select system, task, adapter, "commit" from scores order by id')[1]
    task = "old.jsonl@ffffffff"
    assert rows == [
        ("base", task, None, ""),
        ("one", task, 1, ANN.commit),
        ("dir", task, None, ""),
        ("two", task, None, ""),
    ]


def test_a_rescue_keeps_scores(db: Path) -> None:
    evaluated(db, 0.5)
    Path("s.csv").write_text(f"adapter,x\n{ANN.id},1\n")
    ok("pool", "import", "s.csv")
    assert doctor.check(db) == []
    with closing(sqlite3.connect(db)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert doctor.rescue(db).kept["scores"] == 4
    assert scores_of(db, ANN.id) == {"exact": {"test.jsonl@ffffffff": 0.5}, "score": {"x": 1}}
