"""Several base models in one catalogue: what is known for one stays as it is while another is synced."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_cli.catalogue.adapters import Catalogue
from lora_cli.catalogue.database import open_for_writing
from lora_cli.hub.client import Hub
from lora_cli.records import Adapter
from lora_cli.sources import open_source
from lora_cli.sources.hub import HubSource
from lora_cli.steps.pool.report import pool_report
from lora_cli.steps.pool.sync import SyncReport, sync
from tests.cli import ok, refused
from tests.fake_hub import BASE, FakeHub, lora_files

OTHER = "acme/other-llama"


def put(folder: Path, base: str) -> None:
    folder.mkdir(parents=True)
    for name, data in lora_files(base=base).items():
        (folder / name).write_bytes(data)


@pytest.fixture
def catalogue(tmp_path: Path) -> Iterator[Catalogue]:
    with Catalogue(tmp_path / "catalogue.db") as opened:
        yield opened


def from_hub(catalogue: Catalogue, base: str) -> SyncReport:
    return sync(catalogue, HubSource(Hub()), base=base)


def from_folder(catalogue: Catalogue, folder: Path, base: str) -> SyncReport:
    return sync(catalogue, open_source("folder", str(folder)), base=base)


def fill(fake: FakeHub) -> None:
    fake.add("alice/for-one")
    fake.add("bob/for-other", lora_files(base=OTHER), base=OTHER)
    fake.add("carol/says-both", lora_files(base=OTHER), base=BASE)


def test_a_sync_for_another_base_leaves_every_row_of_the_first_as_it_was(fake: FakeHub, catalogue: Catalogue) -> None:
    fill(fake)
    from_hub(catalogue, BASE)
    before = catalogue.find(base=BASE)
    assert {row.id: row.status for row in before} == {"alice/for-one": "ok", "carol/says-both": "unusable"}
    fake.repos["carol/says-both"].base = OTHER
    assert from_hub(catalogue, OTHER).new == 2
    assert {row.id: row.status for row in catalogue.find(base=OTHER)} == {
        "bob/for-other": "ok",
        "carol/says-both": "ok",
    }
    assert catalogue.find(base=BASE) == before
    assert catalogue.get("carol/says-both").status == "ok", "the row has the verdict by which it can be used"
    fake.repos["carol/says-both"].base = BASE
    fake.forget()
    again = from_hub(catalogue, BASE)
    assert (again.new, again.changed, again.unchanged, len(fake.paths("/resolve/"))) == (0, 0, 2, 0)


def test_a_folder_is_judged_for_each_base_and_both_stay_up_to_date(tmp_path: Path, catalogue: Catalogue) -> None:
    for n, base in enumerate((BASE, BASE, OTHER)):
        put(tmp_path / "pool" / f"a{n}", base=base)
    assert from_folder(catalogue, tmp_path / "pool", BASE).unusable == 1
    before = catalogue.find(base=BASE)
    assert from_folder(catalogue, tmp_path / "pool", OTHER).unusable == 2
    assert catalogue.find(base=BASE) == before
    for base, usable in ((BASE, 2), (OTHER, 1)):
        assert from_folder(catalogue, tmp_path / "pool", base).unchanged == 3
        assert catalogue.candidates(base=base).bases == {base: usable}
        assert catalogue.stats(base=base)["by_status"] == {"ok": usable, "unusable": 3 - usable}
        assert pool_report(catalogue, base=base).total[1:3] == (3, usable)
        assert [row.status for row in catalogue.search("pool", base=base)].count("ok") == usable
        assert len(catalogue.find(["status=ok"], base=base, sort="-rank", limit=2)) == usable
    assert catalogue.bases.counts() == {BASE: 3, OTHER: 3}
    assert [row.status for row in catalogue.find()] == ["ok"] * 3
    assert catalogue.stats()["adapters"] == 3


def adapter(base: str, status: str = "ok", commit: str = "a" * 40, **facts: object) -> Adapter:
    return Adapter(id="x/y", commit=commit, source="hub", repo="x/y", base=base, status=status, **facts)  # type: ignore[arg-type]


def test_a_new_commit_read_for_one_base_leaves_the_verdict_for_the_other_at_its_commit(catalogue: Catalogue) -> None:
    catalogue.add([adapter(BASE, rank=4)], base=BASE)
    catalogue.add([adapter(OTHER, rank=8, commit="b" * 40)], base=OTHER)
    assert [
        (catalogue.known(base=base)["x/y"].commit[0], catalogue.get("x/y", base=base).rank) for base in (BASE, OTHER)
    ] == [
        ("a", 4),
        ("b", 8),
    ]
    assert catalogue.get("x/y").commit == "b" * 40
    catalogue.add([adapter(OTHER, rank=8, commit="d" * 40, ranks={"q": 8})], base=OTHER)
    catalogue.add([adapter("third", "unusable", rank=8, commit="d" * 40, ranks={"q": 8})], base="third")
    catalogue.add([adapter(OTHER, rank=8, commit="b" * 40, ranks={"q": 16})], base=OTHER)
    ranks = [catalogue.get("x/y", base=base).ranks for base in (OTHER, "third")]
    assert ranks == [{"q": 16}, {"q": 8}], "also where they were those of the row before"
    catalogue.add([adapter(BASE, "failed", commit="c" * 40)], base=BASE)
    assert (catalogue.get("x/y").commit[0], catalogue.get("x/y", base=BASE).status) == ("b", "failed")


def test_what_ends_for_all_bases_and_what_ends_for_one(catalogue: Catalogue) -> None:
    for base in (BASE, OTHER):
        catalogue.add([adapter(base, stamp=base)], base=base)
    catalogue.mark(["x/y"], "gone", "no alias any more", base=OTHER)
    assert [catalogue.get("x/y", base=base).status for base in (BASE, OTHER)] == ["ok", "gone"]
    catalogue.learn(adapter(OTHER, "unusable", stamp=OTHER, reason="NaN", sha256="5" * 64))
    assert [catalogue.get("x/y", base=base).reason for base in (BASE, OTHER)] == ["", "NaN"]
    catalogue.mark(["x/y"], "gone", "no longer at its source")
    assert {catalogue.get("x/y", base=base).status for base in (BASE, OTHER)} == {"gone"}
    catalogue.remove(["x/y"])
    assert catalogue.bases.counts() == {}


def test_commands_take_the_base_asked_for_else_that_of_the_settings(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(fake)
    for base in (BASE, OTHER):
        ok("pool", "sync", base)
    assert ok("pool", "list", "-q", "--base", OTHER).out.split() == ["bob/for-other"]
    assert ok("pool", "list", "-q").out.split() == ["alice/for-one", "bob/for-other", "carol/says-both"]
    monkeypatch.setenv("LORA_BASE", BASE)
    assert ok("pool", "list", "-q").out.split() == ["alice/for-one", "carol/says-both"]
    assert ok("pool", "search", "for", "-q").out.split() == ["alice/for-one"]
    assert json.loads(ok("pool", "stats", "--json", "--base", OTHER).out)["usable"] == 1
    assert ok("select", "-k", "1", "-q", "--base", OTHER).out.strip().startswith("bob/for-other")
    told = refused(3, "pool", "list", "--base", "acme/unknown")
    assert "no adapter was judged for the base acme/unknown" in told
    assert f"the catalogue has adapters for {BASE} (2), {OTHER} (1): --base NAME shows them" in told


def test_rows_of_an_older_catalogue_are_for_the_base_of_their_sync(fake: FakeHub, catalogue: Catalogue) -> None:
    fill(fake)
    from_hub(catalogue, BASE)
    expected = catalogue.find(base=BASE)
    catalogue.close()
    db = open_for_writing(catalogue.path)
    for statement in (
        "DROP INDEX adapters_judged_for",
        "ALTER TABLE adapters DROP COLUMN judged_for",
        "DROP TABLE verdicts",
        "DROP TABLE listings",
        "DELETE FROM _sqlite_migrations WHERE name = 'm006_verdicts_per_base'",
    ):
        db.execute(statement)
    db.close()
    assert catalogue.find(base=BASE) == expected
    assert len(expected) == 2
    assert from_hub(catalogue, BASE).unchanged == 2


@pytest.mark.parametrize("name", ["./base", "/nowhere/base", "../base", "~/base", "a/b/c"])
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(own_home: Path, name: str) -> None:
    Path("bases").mkdir()
    error = refused(3, "pool", "sync", name)
    assert error.startswith(f"lora: no base model at {name}: no such folder\n")
    assert ("did you mean bases?" in error) == (name == "./base")
    assert "network" not in error
