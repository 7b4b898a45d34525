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


def statuses(base: str = "") -> dict[str, str]:
    of_base = ["--base", base] if base else []
    return {row["id"]: row["status"] for row in json.loads(ok("pool", "list", "--json", *of_base).out)["rows"]}


def test_an_alias_given_to_sync_counts_wherever_adapters_are_named(pool: Path) -> None:
    ok("pool", "sync", "acme/tiny-it", "--from", "tree/pool", "--alias", "other/mirror-of-tiny")
    ok("merge", *PAIR, "-o", "by-id")
    ok("merge", *(str(pool / name.removeprefix("pool/")) for name in PAIR), "-o", "by-folder")
    ok("pool", "similarity", *PAIR)
    ok("diff", *PAIR)
    ok("pool", "verify", *PAIR, str(pool / "bob/chat"), "--base", "acme/tiny-it")
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
    Path("mybase").mkdir()
    assert "did you mean mybase?" in refused(5, "merge", far, "--base", "./mybas", "-o", "both")
    assert "add the name to base_aliases" in refused(5, "merge", far, "--base", "./mybase", "-o", "both")


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
    ours = ("--base", "acme/tiny-it")
    assert sorted(ok("select", "--by", "random", "-q", *ours).out.split()) == ["pool/alice/sql", "pool/bob/chat"]


def test_many_bases_are_counted_and_not_all_named(own_home: Path) -> None:
    for number in range(8):
        base = f"acme/number-{number}" if number else "acme/number-1"
        write_adapter(own_home / "pool" / str(number), random_factors(SHAPES, 2, seed=number), base=base)
    ok("pool", "sync", "--from", "pool")
    message = refused(2, "select")
    assert "are for 7 base models: acme/number-1 (2), " in message
    assert " and 2 more" in message


FUSED = {"model.layers.0.self_attn.qkv_proj": (32, 12)}
SPLIT = {f"model.layers.0.self_attn.{name}": (16, 12) for name in ("q_proj", "k_proj", "v_proj")}


@pytest.mark.parametrize(
    ("fused", "split"),
    [
        (FUSED, SPLIT),
        ({"model.layers.1.mlp.gate_up_proj": (32, 12)}, {"model.layers.1.mlp.up_proj": (16, 12)}),
        ({"h.0.attention.query_key_value": (32, 12)}, {"h.0.attention.query": (16, 12)}),
        ({"h.0.attn.c_attn": (32, 12)}, {"h.0.attn.q_proj": (16, 12)}),
        ({"h.0.attn.Wqkv": (32, 12)}, {"h.0.attn.k_proj": (16, 12)}),
    ],
    ids=lambda shapes: next(iter(shapes)).rpartition(".")[2],
)
def test_fused_and_split_projections_are_not_of_one_base(
    own_home: Path, fused: dict[str, tuple[int, int]], split: dict[str, tuple[int, int]]
) -> None:
    one = write_adapter(own_home / "pool" / "fused", random_factors(fused, 2, seed=0), base="acme/tiny")
    other = write_adapter(own_home / "pool" / "split", random_factors(split, 2, seed=1), base="nvidia/tiny-FP8")
    whole, part = (next(iter(shapes)).rpartition(".")[2] for shapes in (fused, split))
    for words in (("merge", "-o", "out"), ("diff",), ("pool", "similarity")):
        message = refused(5, *words, str(one), str(other))
        assert f"pool/fused adapts {whole} and pool/split adapts {part}" in message
        assert "one base has only one of them" in message


def test_both_forms_in_different_places_are_one_base(own_home: Path) -> None:
    text = {**FUSED, "model.layers.0.mlp.experts.gate_up_proj": (32, 12)}
    vision = {f"vision.{module}": shape for module, shape in SPLIT.items()}
    shared = {"model.layers.0.mlp.shared_expert.gate_proj": (16, 12)}
    one = write_adapter(own_home / "text", random_factors(text, 2, seed=0))
    other = write_adapter(own_home / "vision", random_factors(vision | shared, 2, seed=1))
    ok("merge", str(one), str(other), "-o", "out")


def test_a_mirror_that_split_the_projections_is_another_base(own_home: Path) -> None:
    write_adapter(own_home / "pool" / "fused", random_factors(FUSED, 2, seed=0), base="microsoft/phi-4")
    mirror = "unsloth/phi-4-unsloth-bnb-4bit"
    write_adapter(own_home / "pool" / "split", random_factors(SPLIT, 2, seed=1), base=mirror)
    ok("pool", "sync", "microsoft/phi-4", "--from", "pool")
    assert statuses() == {"pool/fused": "ok", "pool/split": "unusable"}
    assert f"wrong base: declares {mirror}, asked for microsoft/phi-4" in ok("pool", "list").out
    ok("pool", "sync", "unsloth/phi-4", "--from", "pool")
    assert statuses("unsloth/phi-4") == {"pool/fused": "unusable", "pool/split": "ok"}
    assert statuses("microsoft/phi-4") == {"pool/fused": "ok", "pool/split": "unusable"}
    told = refused(5, "merge", "./pool/fused", "./pool/split", "-o", "out")
    assert "two base models: pool/fused is for microsoft/phi-4, pool/split for unsloth/phi-4-unsloth-bnb-4bit" in told
    told = refused(5, "merge", "./pool/fused", "./pool/split", "--base", "phi-4", "-o", "out")
    assert "pool/fused adapts qkv_proj and pool/split adapts q_proj" in told
