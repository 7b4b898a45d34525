"""An adapter that declares no base is for the base that the user names, as far as the shapes allow."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from lora_cli.catalogue.adapters import Catalogue
from tests.adapters_on_disk import random_factors, write_adapter
from tests.cli import lora, ok, refused
from tests.fake_hub import BASE, FakeHub, lora_files
from tests.tiny_bases import examples, saved

SHAPES = {f"model.layers.{layer}.mlp.down_proj": (32, 48) for layer in (0, 1)}
OTHER = {"model.layers.0.mlp.down_proj": (32, 40)}
NOT_COMPARED = "declares no base model: taken to be for acme/tiny"


def undeclared(folder: Path, shapes: dict[str, tuple[int, int]] = SHAPES, **config: Any) -> Path:
    return write_adapter(
        folder, random_factors(shapes, 8, seed=len(folder.name)), base_model_name_or_path=None, **config
    )


@pytest.fixture
def pool(own_home: Path) -> Path:
    """Adapters that declare no base, one that does, and one whose shapes are those of another base."""
    pool = own_home / "pool"
    undeclared(pool / "tune")
    undeclared(pool / "other", OTHER)
    write_adapter(pool / "declared", random_factors(SHAPES, 8, seed=9))
    return pool


@pytest.fixture
def base(own_home: Path) -> str:
    """A folder that the shapes of `tune` fit."""
    return str(saved(own_home / "base"))


def rows() -> dict[str, tuple[str, str, str]]:
    found = json.loads(ok("pool", "list", "--json").out)["rows"]
    return {row["id"].removeprefix("pool/"): (row["status"], row["base_match"], row["reason"]) for row in found}


def test_a_sync_accepts_it_where_the_shapes_of_the_base_are_known_and_fit(pool: Path, base: str) -> None:
    ok("pool", "sync", base, "--from", "pool", "--alias", "acme/tiny")
    assert rows()["tune"] == ("ok", "shape", "")
    status, match, reason = rows()["other"]
    assert (status, match) == ("unusable", "mismatch")
    assert "declares none" in reason
    assert "shapes differ from base" in reason
    ok("merge", "pool/tune", "pool/declared", "-o", "out")
    ok("pool", "verify", "pool/tune", "--base", base)


def test_a_sync_does_not_guess_where_the_shapes_are_not_known(pool: Path) -> None:
    ok("pool", "sync", "acme/tiny", "--from", "pool")
    reason = "declares no base model; the shapes of acme/tiny are not known here"
    assert rows()["tune"] == ("unusable", "unknown", reason)
    told = lora("pool", "verify", "pool/tune", "--base", "acme/tiny")
    assert (told.code, reason in told.err) == (5, True)
    ok("pool", "sync", "--from", "pool")
    assert rows()["tune"] == ("unusable", "unknown", reason), "a sync for another base leaves this one's verdict"


def test_another_declared_name_still_needs_an_alias(own_home: Path, base: str) -> None:
    write_adapter(own_home / "pool" / "x", random_factors(SHAPES, 8, seed=1), base="./mine")
    ok("pool", "sync", base, "--from", "pool")
    assert rows()["x"][:2] == ("unusable", "shape")
    assert "accept it with --alias" in rows()["x"][2]


@pytest.mark.parametrize(
    "words",
    [("merge", "pool/tune", "-o", "out"), ("diff", "pool/tune", "pool/declared"), ("bake", "pool/tune", "-o", "out")],
    ids=lambda words: words[0],
)
def test_without_a_base_it_is_refused_with_a_way_out(pool: Path, words: tuple[str, ...]) -> None:
    for synced in (False, True):
        message = refused(5, *words)
        assert "declares no base model" in message
        assert "--base NAME" in message
        if not synced:
            ok("pool", "sync", "--from", "pool")


def test_the_users_word_is_enough_where_the_shapes_are_not_known(pool: Path) -> None:
    for synced in (False, True):
        told = ok("merge", str(pool / "tune"), "pool/declared", "--base", "acme/tiny", "-o", "out", "--force")
        assert f"pool/tune: {NOT_COMPARED}\n" in told.err
        assert json.loads(Path("out/adapter_config.json").read_text())["base_model_name_or_path"] == "acme/tiny"
        if not synced:
            ok("pool", "sync", "acme/tiny", "--from", "pool")
    told = ok("merge", "pool/tune", "--base", "acme/tiny", "-o", "by-id")
    assert NOT_COMPARED in told.err
    Path("lora.toml").write_text('base = "acme/tiny"\n')
    assert NOT_COMPARED in ok("diff", "pool/tune", "pool/declared").err
    assert rows()["tune"][0] == "unusable", "the word of one command is not stored for a folder"


def test_every_command_takes_it_for_the_base_that_is_named_if_the_shapes_fit(pool: Path, base: str) -> None:
    lines = [{"prompt": example.prompt, "completion": example.completion} for example in examples(20)]
    Path("task.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tune = str(pool / "tune")
    for words in (
        ("merge", tune, "-o", "merged"),
        ("diff", tune, str(undeclared(pool / "another"))),
        ("eval", tune, "--data", "task.jsonl", "--metric", "nll"),
        ("fit", tune, "--data", "task.jsonl", "--steps", "20", "--granularity", "rank", "-o", "fitted"),
        ("bake", tune, "-o", "baked"),
    ):
        told = ok(*words, "--base", base)
        assert "declares no base model" not in told.err
    for folder in ("merged", "fitted"):
        assert json.loads(Path(folder, "adapter_config.json").read_text())["base_model_name_or_path"] == "base"
    message = refused(5, "merge", str(pool / "other"), "--base", base, "-o", "none")
    assert (
        "pool/other does not fit LlamaForCausalLM: shapes differ from base at model.layers.0.mlp.down_proj" in message
    )


def test_a_base_that_only_the_other_adapters_name_is_not_the_users_word(pool: Path, own_home: Path) -> None:
    shutil.move(pool / "declared", own_home / "known" / "declared")
    ok("pool", "sync", "acme/tiny", "--from", "known")
    assert "declares no base model" in refused(5, "merge", "known/declared", str(pool / "tune"), "-o", "out")


@pytest.fixture
def fake(fake: FakeHub) -> FakeHub:
    fake.add("x/none", lora_files(base=None))
    return fake


def test_an_adapter_of_the_hub_that_declares_none_is_taken_at_the_users_word(fake: FakeHub) -> None:
    message = refused(5, "merge", "x/none", "-o", "out")
    assert "x/none: declares no base model" in message
    assert "--base NAME" in message
    ok("pool", "sync", BASE)
    assert rows()["x/none"][0] == "unusable"
    told = ok("merge", "x/none", "--base", BASE, "-o", "out")
    assert "module names are not checked against acme/tiny" in told.err
    with Catalogue(Path(os.environ["LORA_DB"])) as catalogue:
        row = catalogue.get("x/none")
        assert (row.status, row.base, row.base_match) == ("ok", BASE, "unknown")
        assert catalogue.provenance("x/none")["hub_id"] == fake.repos["x/none"].hub_id
    ok("pool", "sync", BASE)
    assert rows()["x/none"][0] == "unusable", "a sync names no adapter"


def test_an_adapter_of_the_hub_whose_shapes_do_not_fit_is_not_stored(fake: FakeHub, base: str) -> None:
    message = refused(5, "merge", "x/none", "--base", base, "-o", "out")
    assert "x/none: wrong base: declares none" in message
    assert "shapes differ from base" in message
    told = refused(3, "pool", "list")
    assert "catalogue.db: no adapter is known" in told
    assert "lora pool sync fills the catalogue" in told
