"""A folder that was moved or copied with its catalogue is the same pool at another place, and no second one."""

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from lora_cli.catalogue import runs
from lora_cli.catalogue.adapters import Catalogue
from lora_cli.catalogue.doctor import rescue
from lora_cli.sources.folder import FolderSource
from lora_cli.steps.evaluate.request import last_written
from lora_cli.steps.pool.sync import sync
from tests.adapters_on_disk import random_factors, write_adapter
from tests.cli import ok

SHAPES = {"model.layers.0.self_attn.q_proj": (16, 16)}


@pytest.fixture
def project(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as `lora demo` makes it: settings, base, pool and catalogue side by side; synced, with one merge."""
    monkeypatch.delenv("LORA_DB")
    folder = own_home / "project"
    for seed, name in enumerate(("a", "b")):
        write_adapter(folder / "pool" / name, random_factors(SHAPES, 2, seed=seed))
    (folder / "base").mkdir()
    (folder / "lora.toml").write_text('base = "base"\nbase_aliases = ["acme/tiny"]\npool = "pool"\ndb = "lora.db"\n')
    monkeypatch.chdir(folder)
    ok("pool", "sync")
    ok("merge", "pool/a", "pool/b", "-m", "linear")
    return folder


def rows() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(ok("pool", "list", "--json").out)["rows"]
    return found


def last_run(folder: Path) -> Path:
    [name] = last_written(folder / "lora.db")
    return Path(name).parent.parent


def places(folder: Path) -> set[str]:
    """Every path in the catalogue of `folder`, as it is stored."""
    with closing(sqlite3.connect(folder / "lora.db")) as db:
        return {
            row[0]
            for query in (
                "SELECT repo FROM adapters", "SELECT base FROM adapters", "SELECT out FROM runs",
                "SELECT source FROM syncs", "SELECT base FROM syncs", "SELECT base FROM aliases",
            )
            for row in db.execute(query)
        }  # fmt: skip


def test_in_a_copy_each_adapter_is_listed_once_with_the_files_of_the_copy(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, copy = places(project), project.with_name("copy")
    shutil.copytree(project, copy)
    monkeypatch.chdir(copy)
    assert [(row["id"], row["repo"]) for row in rows()] == [(f"pool/{n}", str(copy / "pool" / n)) for n in "ab"]
    ok("pool", "sync")
    assert [(row["id"], row["repo"]) for row in rows()] == [(f"pool/{n}", str(copy / "pool" / n)) for n in "ab"]
    assert {row["base"] for row in rows()} == {str(copy / "base")}
    assert last_run(copy) == copy
    assert "is up to date" in ok("merge", "pool/a", "pool/b", "-m", "linear").err
    monkeypatch.chdir(project)
    assert places(project) == before
    assert last_run(project) == project
    assert [row["repo"] for row in rows()] == [str(project / "pool" / n) for n in "ab"]


def test_a_moved_folder_is_the_same_pool(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = project.parent / "deeper" / "other"
    moved.parent.mkdir()
    project.rename(moved)
    monkeypatch.chdir(moved)
    assert last_run(moved) == moved
    assert [(row["id"], row["repo"]) for row in rows()] == [(f"pool/{n}", str(moved / "pool" / n)) for n in "ab"]
    assert {place for place in places(moved) if str(project) in place} == set()
    assert " 2 unchanged" in (told := ok("pool", "sync").err) or " 2 changed" in told
    assert len(rows()) == 2


def test_the_demo_renamed_as_its_own_pool_keeps_its_ids(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORA_DB")
    folder = own_home / "pool"
    write_adapter(folder / "a", random_factors(SHAPES, 2, seed=0))
    (folder / "lora.toml").write_text('pool = "."\ndb = "lora.db"\n')
    monkeypatch.chdir(folder)
    ok("pool", "sync")
    shutil.copytree(folder, own_home / "renamed")
    monkeypatch.chdir(own_home / "renamed")
    ok("pool", "sync")
    assert [(row["id"], row["repo"]) for row in rows()] == [("pool/a", str(own_home / "renamed" / "a"))]


def test_a_catalogue_that_went_alone_keeps_the_paths(project: Path, tmp_path: Path) -> None:
    alone = tmp_path / "backup" / "lora.db"
    alone.parent.mkdir()
    with closing(sqlite3.connect(project / "lora.db")) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    shutil.copy(project / "lora.db", alone)
    with Catalogue(alone) as catalogue:
        assert catalogue.get("pool/a").repo == str(project / "pool" / "a")
    assert runs.latest_output(alone, ["merge"]) == runs.latest_output(project / "lora.db", ["merge"])


def test_a_catalogue_beside_what_was_moved_follows_too(tmp_path: Path) -> None:
    write_adapter(tmp_path / "one" / "pool" / "a", random_factors(SHAPES, 2, seed=0))
    with Catalogue(tmp_path / "one" / "data" / "lora.db") as catalogue:
        sync(catalogue, FolderSource(tmp_path / "one" / "pool"))
    (tmp_path / "one").rename(tmp_path / "two")
    with Catalogue(tmp_path / "two" / "data" / "lora.db") as catalogue:
        assert catalogue.get("pool/a").repo == str(tmp_path / "two" / "pool" / "a")


def test_a_tree_that_was_renamed_is_recognised_by_its_bytes(tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "b")):
        write_adapter(tmp_path / "old" / name, random_factors(SHAPES, 2, seed=seed))
    with Catalogue(tmp_path / "elsewhere" / "lora.db") as catalogue:
        sync(catalogue, FolderSource(tmp_path / "old"))
        (tmp_path / "old").rename(tmp_path / "new")
        write_adapter(tmp_path / "new" / "c", random_factors(SHAPES, 2, seed=3))
        sync(catalogue, FolderSource(tmp_path / "new"))
        assert {row.id: row.repo for row in catalogue.find()} == {
            "old/a": str(tmp_path / "new" / "a"),
            "old/b": str(tmp_path / "new" / "b"),
            "new/c": str(tmp_path / "new" / "c"),
        }


def test_a_tree_below_a_catalogued_one_is_no_second_one(tmp_path: Path) -> None:
    write_adapter(tmp_path / "all" / "some" / "a", random_factors(SHAPES, 2, seed=0))
    with Catalogue(tmp_path / "lora.db") as catalogue:
        for root in ("all", "all/some"):
            sync(catalogue, FolderSource(tmp_path / root))
        assert [row.id for row in catalogue.find()] == ["all/some/a"]


def test_a_catalogue_that_cannot_be_written_is_read_as_it_is(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = project.with_name("copy")
    shutil.copytree(project, copy)
    monkeypatch.setattr("lora_cli.catalogue.database.os.access", lambda *_: False)
    with Catalogue(copy / "lora.db") as catalogue:
        assert catalogue.get("pool/a").repo == str(project / "pool" / "a")


def test_a_rescued_catalogue_still_follows_its_files(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = project.with_name("moved")
    project.rename(moved)
    monkeypatch.chdir(moved)
    rescue(moved / "lora.db")
    assert [row["repo"] for row in rows()] == [str(moved / "pool" / n) for n in "ab"]
