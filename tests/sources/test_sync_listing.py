"""Which adapters a sync of a Hub looks at: pages that go on, copies, authors, sizes, lists of ids; and its summary."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_cli.catalogue.adapters import Catalogue
from lora_cli.errors import NetworkError
from lora_cli.hub.client import Hub
from lora_cli.sources.hub import HubSource
from lora_cli.steps.pool.sync import SyncOptions, SyncReport, sync
from tests.cli import lora, ok, refused
from tests.fake_hub import BASE, FakeHub, lora_files


@pytest.fixture
def catalogue(tmp_path: Path) -> Iterator[Catalogue]:
    with Catalogue(tmp_path / "catalogue.db") as opened:
        yield opened


def synced(catalogue: Catalogue, **options: Any) -> SyncReport:
    return sync(catalogue, HubSource(Hub(tries=1)), SyncOptions(**options), base=BASE)


def listings(fake: FakeHub) -> list[str]:
    return fake.paths("/api/models?")


def test_a_listing_that_broke_off_goes_on_from_the_page_that_was_not_read(fake: FakeHub, catalogue: Catalogue) -> None:
    fake.page_size = 3
    fake.add_many(9)
    fake.fail("cursor=6", status=500, times=5)
    with pytest.raises(NetworkError):
        synced(catalogue)
    assert len(catalogue.find(status="ok")) == 6
    fake.heal()
    fake.forget()
    report = synced(catalogue)
    assert (report.seen, report.new, report.gone) == (3, 3, 0)
    assert ["cursor=6" in path for path in listings(fake)] == [True]
    fake.forget()
    assert (synced(catalogue).unchanged, len(listings(fake))) == (9, 3)


def test_the_address_of_another_server_is_not_gone_on_with(fake: FakeHub, catalogue: Catalogue) -> None:
    fake.add_many(2)
    catalogue.listings.remember(fake.endpoint, BASE, BASE, f"{fake.cdn}/api/models?cursor=1")
    assert synced(catalogue).new == 2
    assert fake.paths(server="cdn", match="/api/models") == []


def test_copies_of_the_base_are_found_once_a_week_and_listed_if_they_have_adapters(
    fake: FakeHub, catalogue: Catalogue
) -> None:
    quantised = ("base_model:quantized:acme/tiny-llama",)
    fake.add("unsloth/tiny-llama-bnb-4bit", {"config.json": b"{}"}, base="", tags=quantised)
    fake.add("unsloth/tiny-llama-GGUF", {"config.json": b"{}"}, base="", tags=quantised)
    fake.add("unsloth/tiny-llama", {"config.json": b"{}"}, base="")
    fake.add("mallory/not-llama-at-all", {"config.json": b"{}"}, base="", tags=quantised)
    twin = "unsloth/tiny-llama-bnb-4bit"
    fake.add("bob/on-a-copy", lora_files(base=twin), base=twin)
    fake.add("alice/plain")
    assert synced(catalogue, copies=True).new == 2
    assert {row.id: row.base_match for row in catalogue.find(status="ok")} == {
        "alice/plain": "exact",
        "bob/on-a-copy": "alias",
    }
    assert len(listings(fake)) == 1 + 2 + 2, "the base, two questions for copies, two of them by the tables of names"
    fake.forget()
    assert synced(catalogue, copies=True).unchanged == 2
    assert len(listings(fake)) == 2, "the base, and the one copy that has adapters"


def test_only_the_authors_asked_for_are_listed(fake: FakeHub, catalogue: Catalogue) -> None:
    fake.add_many(20)
    report = synced(catalogue, authors=("author3", "author4"))
    assert {row.author for row in catalogue.find()} == {"author3", "author4"}
    assert (report.seen, report.pages) == (4, 2)
    synced(catalogue)
    assert synced(catalogue, authors=("author3",)).gone == 0


def test_weights_over_the_largest_size_are_refused_until_more_is_allowed(fake: FakeHub, catalogue: Catalogue) -> None:
    fake.add("x/small", lora_files(rank=2))
    fake.add("x/large", lora_files(rank=16))
    most = len(lora_files(rank=2)["adapter_model.safetensors"])
    assert synced(catalogue, max_bytes=most).unusable == 1
    assert "of weights, more than --max-size" in catalogue.get("x/large").reason
    assert synced(catalogue, max_bytes=most).unchanged == 2
    assert synced(catalogue).changed == 1
    assert catalogue.get("x/large").status == "ok"
    assert "not a size" in refused(2, "pool", "sync", BASE, "--max-size", "huge")


def test_a_list_of_ids_is_read_and_a_bad_line_is_named(fake: FakeHub, tmp_path: Path) -> None:
    fake.add("alice/one")
    fake.add("bob/two")
    file = tmp_path / "ids.txt"
    file.write_text("# mine\nalice/one\n\nbob/gone # was here\n")
    assert "2 seen · 2 new" in ok("pool", "sync", "--from", str(file)).err
    told = {row["id"]: (row["status"], row["reason"]) for row in json.loads(ok("pool", "list", "--json").out)["rows"]}
    assert told["alice/one"] == ("ok", "")
    assert told["bob/gone"][0] == "gone"
    assert told["bob/gone"][1].startswith("ids.txt:4: ")
    file.write_text("alice/one\nno id at all\n")
    assert f"{file}:2: 'no id at all' is no id of the Hub" in refused(1, "pool", "sync", "--from", str(file))
    file.write_text("# nothing\n")
    assert "holds no ids" in refused(1, "pool", "sync", "--from", str(file))


def test_a_large_sync_tells_what_it_found(fake: FakeHub) -> None:
    fake.add_many(100)
    for n in range(3):
        fake.add(f"zoe/pickle-{n}", {"adapter_config.json": lora_files()["adapter_config.json"], "x.bin": b""})
    plan = json.loads(ok("pool", "sync", BASE, "--dry-run", "--json").out)
    assert plan["expected"] == {"requests": 412, "bytes": 824_000, "seconds": 10}
    assert (plan["pages"], plan["requests"]) == (1, 3)
    told = lora("pool", "sync", BASE).err.splitlines()
    assert told[-5:] == [
        "made in the week: 2026-W01 103",
        "cannot be used: no adapter_model.safetensors 3",
        "authors: author0 10 · author1 10 · author2 10 · author3 10 · author4 10",
        "the same weights as another: 96; select --dedupe 1 takes one of each",
        "nearly equal to another: not measured; lora pool verify --deep sketches fetched weights",
    ]
    # The hashes are those that the Hub states: no weights were fetched.
    chosen = ok("select", "--by", "downloads", "--dedupe", "1", "-k", "50", "-q").out.split()
    assert [id.partition("@")[0] for id in chosen] == [f"author{n % 10}/lora-00{n}" for n in (99, 98, 97, 96)]
