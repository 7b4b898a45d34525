"""Which base adapters count as being of: what a sync was told, what the command says, what they declare themselves."""

import json
from pathlib import Path

import pytest

from tests.adapters_on_disk import random_factors, write_adapter
from tests.cli import lora, ok, refused

SHAPES = {"model.layers.0.q_proj": (16, 12)}
PAIR = ("pool/alice/sql", "pool/bob/chat")


@pytest.fixture
def pool(own_home: Path) -> Path:
    """Two adapters whose bases are one model under two names, and one of another base."""
    for seed, (name, base) in enumerate(
        {"alice/sql": "acme/tiny-it", "bob/chat": "other/mirror-of-tiny", "carol/far": "acme/far"}.items()
    ):
        write_adapter(own_home / "tree" / "pool" / name, random_factors(SHAPES, 3, seed=seed), base=base)
    return own_home / "tree" / "pool"


def statuses() -> dict[str, str]:
    return {row["id"]: row["status"] for row in json.loads(ok("pool", "list", "--json").out)["rows"]}


def test_an_alias_given_to_sync_counts_wherever_adapters_are_named(pool: Path) -> None:
    ok("pool", "sync", "acme/tiny-it", "--from", "tree/pool", "--alias", "other/mirror-of-tiny")
    ok("merge", *PAIR, "-o", "by-id")
    ok("merge", *(str(pool / name.removeprefix("pool/")) for name in PAIR), "-o", "by-folder")
    ok("pool", "similarity", *PAIR)
    ok("diff", *PAIR)
    record = json.loads(Path("by-id/adapter_config.json").read_text())
    assert record["base_model_name_or_path"] == "acme/tiny-it"


def test_folders_are_not_judged_by_the_base_of_the_last_sync(pool: Path) -> None:
    ok("pool", "sync", "acme/tiny-it", "--from", "tree/pool")
    far = str(pool / "carol/far")
    ok("merge", far, "-o", "alone")
    ok("merge", far, "--base", "acme/far", "-o", "asked")
    told = refused(5, "merge", "pool/carol/far", "-o", "by-id")
    assert "wrong base: declares acme/far, asked for acme/tiny-it" in told
    assert "sync its own base to use it there, or name its folder" in told
    assert "is for acme/far, not for acme/tiny-it" in refused(5, "merge", "pool/alice/sql", far, "-o", "both")


def test_verify_stores_nothing(pool: Path) -> None:
    ok("pool", "sync", "acme/tiny-it", "--from", "tree/pool")
    before = statuses()
    assert before["pool/carol/far"] == "unusable"
    assert lora("pool", "verify", *(str(folder) for folder in sorted(pool.glob("*/*"))), "--deep").code == 0
    assert lora("pool", "verify", *before, "--deep", "--json").code == 0
    assert statuses() == before


def test_two_bases_without_a_word_are_refused_and_the_way_out_is_named(pool: Path) -> None:
    told = refused(5, "merge", str(pool / "alice/sql"), str(pool / "bob/chat"), "-o", "out")
    assert "two base models" in told
    assert "--base" in told


def test_a_selection_by_name_is_not_called_the_last(pool: Path) -> None:
    ok("pool", "sync", "acme/tiny-it", "--from", "tree/pool", "--alias", "other/mirror-of-tiny")
    ok("select", "--by", "random", "-k", "2", "--name", "two")
    ok("select", "--by", "rank", "-k", "1")
    assert "adapters: the selection 'two', 2 by random" in ok("merge", "--selection", "two", "-o", "out").err
    assert "adapters: the last selection, 1 by rank" in ok("merge", "-o", "other").err


def test_without_a_base_nothing_is_chosen_from_several(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ok("pool", "sync", "--from", "tree/pool")
    for words in (
        ("select", "--by", "random"),
        ("select", "--by", "rank", "-k", "1"),
        ("merge",),
        ("pool", "similarity"),
    ):
        message = refused(2, *words)
        assert "the usable adapters are for 3 base models: " in message
        assert "acme/far (1)" in message
        assert "--base NAME" in message
    assert ok("select", "--by", "random", "--base", "acme/far", "-q").out.split() == ["pool/carol/far"]
    assert ok("select", "--by", "random", "--where", "base=acme/tiny-it", "-q").out.split() == ["pool/alice/sql"]
    monkeypatch.setenv("LORA_BASE", "other/mirror-of-tiny")
    assert ok("select", "--by", "random", "-q").out.split() == ["pool/bob/chat"]
    monkeypatch.delenv("LORA_BASE")
    ok("pool", "sync", "acme/tiny-it", "--from", "tree/pool", "--alias", "other/mirror-of-tiny")
    assert sorted(ok("select", "--by", "random", "-q").out.split()) == ["pool/alice/sql", "pool/bob/chat"]


def test_many_bases_are_counted_and_not_all_named(own_home: Path) -> None:
    for number in range(8):
        base = f"acme/number-{number}" if number else "acme/number-1"
        write_adapter(own_home / "pool" / str(number), random_factors(SHAPES, 2, seed=number), base=base)
    ok("pool", "sync", "--from", "pool")
    message = refused(2, "select")
    assert "are for 7 base models: acme/number-1 (2), " in message
    assert " and 2 more" in message
