"""What happens to a pool with time: new commits, new names, another base, other aliases, a project that moved."""

import json
import os
import shutil
from pathlib import Path

import pytest

from lora_cli.catalogue.adapters import Catalogue
from lora_cli.records import AdapterRow
from tests.cli import ok, refused
from tests.fake_hub import BASE, FakeHub, lora_files

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TWIN = "copies/tiny-llama-nf9"


def put(folder: Path, **facts: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in lora_files(**facts).items():  # type: ignore[arg-type]
        (folder / name).write_bytes(data)
    return folder


def rows(base: str | None = None) -> dict[str, AdapterRow]:
    with Catalogue(Path(os.environ["LORA_DB"])) as catalogue:
        return {row.id: row for row in catalogue.find(base=base)}


def inputs(folder: str) -> list[str]:
    return list(json.loads(Path(folder, "run.json").read_text())["inputs"])


def again(fake: FakeHub, id: str) -> str:
    """A new commit of `id` with other weights; returns the old one."""
    old = fake.repos[id].sha
    fake.repos[id].commit(adapter_model__safetensors=lora_files(value=1.0)[WEIGHTS])
    return old


def test_a_selection_outlives_new_commits_as_long_as_its_files_are_in_the_cache(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.add("alice/sql")
    ok("pool", "sync", BASE)
    ok("select", "-k", "1")
    ok("pool", "fetch")
    old = again(fake, "alice/sql")
    ok("pool", "sync", BASE)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "the catalogue is at another commit" in ok("merge", "-o", "out").err
    assert inputs("out") == [f"alice/sql@{old}"]
    assert json.loads(ok("pool", "verify", f"alice/sql@{old}", "--json").out)["rows"][0]["commit"] == old
    assert rows()["alice/sql"].commit == fake.repos["alice/sql"].sha


def test_a_pinned_version_that_is_bad_is_refused_though_the_newest_is_not(fake: FakeHub) -> None:
    fake.add("alice/sql", lora_files(value=float("nan")))
    ok("pool", "sync", BASE)
    ok("select", "-k", "1")
    assert "NaN" in refused(5, "pool", "fetch")
    again(fake, "alice/sql")
    ok("pool", "sync", BASE)
    assert "NaN" in refused(5, "merge", "-o", "out")


def test_a_selection_whose_files_are_nowhere_says_that_it_is_out_of_date(fake: FakeHub, own_home: Path) -> None:
    put(own_home / "pool" / "mine")
    ok("pool", "sync", BASE, "--from", "pool")
    ok("select", "-k", "1")
    put(own_home / "pool" / "mine", value=0.25)
    ok("pool", "sync", BASE, "--from", "pool")
    message = refused(3, "merge", "-o", "out")
    assert "pool/mine is at commit" in message
    assert "to use it as it is, or run lora select again" in message


def test_a_selection_follows_a_repository_to_its_new_name(fake: FakeHub) -> None:
    fake.add("alice/old-name")
    ok("pool", "sync", BASE)
    ok("select", "-k", "1")
    fake.rename("alice/old-name", "alice/new-name")
    ok("pool", "sync", BASE)
    ok("merge", "-o", "out")
    assert inputs("out") == [f"alice/new-name@{fake.repos['alice/new-name'].sha}"]


def test_an_alias_is_remembered_until_it_is_dropped(fake: FakeHub) -> None:
    fake.add("alice/plain")
    fake.add("bob/on-a-copy", lora_files(base=TWIN), base=TWIN)
    ok("pool", "sync", BASE, "--alias", TWIN)
    assert rows()["bob/on-a-copy"].status == "ok"
    again(fake, "bob/on-a-copy")
    assert "2 seen · 0 new · 1 changed" in ok("pool", "sync", BASE).err
    assert rows()["bob/on-a-copy"].status == "ok"
    ok("pool", "sync", BASE, "--no-alias", TWIN)
    row = rows()["bob/on-a-copy"]
    assert (row.status, row.reason) == ("gone", "the name of its base is no longer an alias")
    assert "1 seen · 0 new" in ok("pool", "sync", BASE).err
    ok("pool", "sync", BASE, "--alias", TWIN)
    assert rows()["bob/on-a-copy"].status == "ok"


def test_what_is_said_of_one_base_does_not_hold_for_another(
    fake: FakeHub, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(own_home / "pool" / "mine", base="demo/tiny")
    (own_home / "base").mkdir()
    (own_home / "lora.toml").write_text('base = "base"\nbase_aliases = ["demo/tiny"]\npool = "pool"\n')
    ok("pool", "sync")
    ok("pool", "sync", "base")
    assert rows()["pool/mine"].base == str(own_home / "base")
    fake.add("alice/sql")
    for words in ((), (BASE,)):
        if not words:
            monkeypatch.setenv("LORA_BASE", BASE)
        told = ok("pool", "sync", *words)
        assert "from the Hub (pool: default: that of lora.toml is for another base)" in told.err
        monkeypatch.delenv("LORA_BASE", raising=False)
    ok("pool", "sync", BASE, "--from", "pool")
    assert {row.id: row.status for row in rows(BASE).values()} == {"alice/sql": "ok", "pool/mine": "unusable"}
    assert "wrong base: declares demo/tiny" in rows(BASE)["pool/mine"].reason
    assert {id: row.status for id, row in rows(str(own_home / "base")).items()} == {"pool/mine": "ok"}
    assert rows()["pool/mine"].status == "ok", "a row has the verdict by which the adapter can be used"


def test_a_project_that_moved_keeps_its_rows(own_home: Path) -> None:
    for name in ("kept", "lost"):
        put(own_home / "old" / "pool" / name)
    ok("pool", "sync", "--from", "old/pool")
    ok("select", "-k", "2")
    shutil.move("old", "new")
    shutil.rmtree("new/pool/lost")
    assert "1 seen · 0 new · 1 changed · 0 unchanged · 1 gone" in ok("pool", "sync", "--from", "new/pool").err
    assert {row.id: (row.status, row.repo) for row in rows().values()} == {
        "pool/kept": ("ok", str(own_home / "new" / "pool" / "kept")),
        "pool/lost": ("gone", str(own_home / "old" / "pool" / "lost")),
    }
    assert "1 unchanged" in ok("pool", "sync", "--from", "new/pool").err
    ok("merge", "pool/kept", "-o", "out")


def test_a_folder_never_takes_the_row_of_a_repository(fake: FakeHub, own_home: Path) -> None:
    fake.add("pool/mine")
    ok("pool", "sync", BASE)
    folder = put(own_home / "pool" / "mine")
    ok("pool", "sync", BASE, "--from", "pool")
    assert {row.id: row.source for row in rows().values()} == {"pool/mine": "hub", str(folder): "folder"}
