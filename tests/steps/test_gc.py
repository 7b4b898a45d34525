"""`pool gc` deletes from the Hub's cache what nobody needs any more, and nothing else."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from lora_cli.catalogue import runs
from lora_cli.catalogue.adapters import Catalogue
from lora_cli.hub.holdings import delete
from lora_cli.imports._cached import place_of
from lora_cli.records import Adapter, AdapterRef
from lora_cli.steps.pool.gc import survey
from tests.cli import ok, refused
from tests.imports.kinds import adapterhub

OLD, NEW = "a" * 40, "b" * 40
COMMAND = ("pool", "gc", "--json")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def put(cache: Path, repo: str, commit: str, size: int, shared: int = 0) -> Path:
    """A revision in the layout of the Hub's client, with a file of its own and maybe one that all revisions share."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    for name, blob, length in (("own", commit, size), ("shared", "s" * 40, shared)):
        if length:
            (folder / "blobs").mkdir(parents=True, exist_ok=True)
            (folder / "blobs" / blob).write_bytes(b"x" * length)
            (folder / "snapshots" / commit).mkdir(parents=True, exist_ok=True)
            (folder / "snapshots" / commit / name).symlink_to(f"../../blobs/{blob}")
    return folder


def row(id: str, commit: str, status: Any = "ok") -> Adapter:
    return Adapter(id=id, commit=commit, source="hub", repo=id.partition(":")[0], status=status)


def fill(cache: Path, db: Path) -> None:
    """Adapters of every kind in the catalogue and in the cache, and a base model that only the cache knows."""
    with Catalogue(db) as catalogue:
        catalogue.add([row("a/two", NEW), row("a/gone", "c" * 40, "gone"), row("a/held", "d" * 40, "quarantined")])
        catalogue.add([row("a/kept:sub", NEW)])
    put(cache, "a/two", OLD, 100, shared=1000)
    put(cache, "a/two", NEW, 20, shared=1000)
    put(cache, "a/gone", "c" * 40, 3000)
    put(cache, "a/held", "d" * 40, 7)
    put(cache, "a/kept", NEW, 11)
    put(cache, "acme/base", "c" * 40, 50_000)


def reasons(db: Path, **how: Any) -> dict[tuple[str, str], tuple[str, int]]:
    with Catalogue(db) as catalogue:
        return {(held.repo, held.commit[:1]): (held.reason, held.bytes) for held in survey(catalogue, db, **how)}


def files(cache: Path) -> int:
    return sum(1 for file in cache.rglob("*") if file.is_file())


def test_what_can_go_is_said_with_its_reason_and_size(cache: Path, own_home: Path) -> None:
    fill(cache, db := Path(os.environ["LORA_DB"]))
    assert reasons(db) == {
        ("a/gone", "c"): ("gone", 3000),
        ("a/held", "d"): ("quarantined", 7),
        ("a/kept", "b"): ("", 11),
        ("a/two", "a"): ("older revision", 100),
        ("a/two", "b"): ("", 20),
    }
    before = files(cache)
    told = ok(*COMMAND)
    assert {one["id"] for one in json.loads(told.out)["rows"] if one["reason"]} == {"a/gone", "a/held", "a/two"}
    assert "5 parts held, 3.1 kB · 3 can go, 3.1 kB; --yes deletes it" in told.err
    assert files(cache) == before


def test_only_what_can_go_is_deleted_and_the_freed_bytes_are_said(cache: Path, own_home: Path) -> None:
    fill(cache, Path(os.environ["LORA_DB"]))
    assert "3 deleted, 3.1 kB freed" in ok(*COMMAND, "--yes").err
    left = {folder.name for folder in cache.iterdir() if folder.name.startswith("models")}
    assert left == {"models--a--two", "models--a--kept", "models--acme--base"}
    two = cache / "models--a--two"
    assert [one.name for one in (two / "snapshots").iterdir()] == [NEW]
    assert (two / "snapshots" / NEW / "shared").read_bytes() == b"x" * 1000
    assert "0 deleted, 0 B freed" in ok(*COMMAND, "--yes").err
    assert "exclude" in refused(2, "pool", "gc", "--yes", "--dry-run")


def test_what_a_selection_or_a_lock_names_stays(cache: Path, own_home: Path) -> None:
    fill(cache, db := Path(os.environ["LORA_DB"]))
    with Catalogue(db) as catalogue:
        old = AdapterRef(id="a/two", commit=OLD, source="hub", repo="a/two")
        catalogue.selections.remember("pinned", [(old, None)], "rank", {})
    with runs.recorded(db, "merge", {}, {f"a/held@{'d' * 40}": "0" * 64}, None):
        pass
    assert {place for place, (reason, _) in reasons(db).items() if reason} == {("a/gone", "c")}


def test_what_nobody_reads_goes_after_the_days_given(cache: Path, own_home: Path) -> None:
    fill(cache, db := Path(os.environ["LORA_DB"]))
    long_ago = time.time() - 40 * 86_400
    os.utime(cache / "models--a--kept" / "blobs" / NEW, (long_ago, long_ago))
    assert reasons(db, unused=30)["a/kept", "b"] == ("unused for 40 days", 11)
    assert reasons(db, unused=50)["a/kept", "b"] == ("", 11)


def test_an_unfinished_download_goes_once_it_stands_still(cache: Path, own_home: Path) -> None:
    fill(cache, db := Path(os.environ["LORA_DB"]))
    part = cache / "models--a--kept" / "blobs" / "f.incomplete"
    part.write_bytes(b"x" * 500)
    assert reasons(db)["a/kept", ""] == ("", 500)
    os.utime(part, (1, 1))
    assert reasons(db)["a/kept", ""] == ("unfinished download", 500)
    ok(*COMMAND, "--yes")
    assert not part.exists()


def test_two_at_once_and_no_cache_at_all_are_no_error(cache: Path, own_home: Path) -> None:
    assert json.loads(ok(*COMMAND).out)["rows"] == []
    fill(cache, db := Path(os.environ["LORA_DB"]))
    with Catalogue(db) as catalogue:
        going = [held for held in survey(catalogue, db) if held.reason]
    assert (delete(going), delete(going), delete([])) == (3107, 0, 0)


def test_conversions_are_listed_and_go_if_no_row_has_them(cache: Path, own_home: Path, tmp_path: Path) -> None:
    for name in ("listed", "other"):
        (tmp_path / "pool" / name).mkdir(parents=True)
        adapterhub(tmp_path / "pool" / name, alpha=16 if name == "listed" else 8)
    ok("pool", "sync", "roberta-base", "--from", str(tmp_path / "pool"))
    ok("pool", "verify", str(tmp_path / "pool" / "other"))
    ok("pool", "rm", "pool/other")
    place = place_of("0" * 40).parent
    for name in (f"0-{'1' * 40}", f".1-{'2' * 40}.abcd.partial"):
        (place / name).mkdir()
        (place / name / "adapter_model.safetensors").write_bytes(b"x" * 9)
    (place / "mine").mkdir()
    rows = {row["id"]: row["reason"] for row in json.loads(ok(*COMMAND).out)["rows"] if row["reason"]}
    assert rows == {"a converted adapter": "older form"}, "what was just read may be in use"
    for file in place.rglob("*"):
        os.utime(file, (1, 1))
    found = sorted((row["id"], row["reason"]) for row in json.loads(ok(*COMMAND).out)["rows"])
    assert found == [
        ("a converted adapter", "in no catalogue"),
        ("a converted adapter", "older form"),
        ("a converted adapter", "unfinished conversion"),
        ("pool/listed", ""),
    ]
    assert "3 deleted" in ok(*COMMAND, "--yes").err
    assert len([*place.iterdir()]) == 2
    assert (place / "mine").is_dir()
    os.utime(next(file for file in place.rglob("*.safetensors")), (1, 1))
    assert "unused for" in ok(*COMMAND, "--unused", "30").out
