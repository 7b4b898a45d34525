"""Selections: what each method prefers, what restricts them, and that they are remembered."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_cli.algebra.lowrank import inner
from lora_cli.catalogue.adapters import Catalogue
from lora_cli.errors import NothingMatched, UsageError
from lora_cli.formats.reader import open_adapter
from lora_cli.formats.store import folder_ref, locate
from lora_cli.recipes import SelectOptions
from lora_cli.records import Adapter
from lora_cli.selection_methods.cosine import cosine
from lora_cli.steps.pool.select import select
from tests.adapters_on_disk import random_factors, write_adapter
from tests.cli import lora, ok, refused
from tests.paths import SHARED

WILD = SHARED / "wild" / "adapters"
SHAPES = {"layers.0.q_proj": (24, 16), "layers.0.v_proj": (8, 16)}


def row(number: int, **facts: object) -> Adapter:
    """A usable adapter as a sync would have stored it."""
    known = {"author": f"author{number % 3}", "rank": 4, "ranks": {"q": 4}, "base": "acme/tiny"} | facts
    name = f"{known['author']}/lora{number}"
    return Adapter(id=name, commit=f"{number:040x}", source="hub", repo=name, **known)  # type: ignore[arg-type]


def silent(text: str) -> None:
    raise AssertionError(text)


@pytest.fixture
def catalogue(tmp_path: Path) -> Catalogue:
    """Twelve adapters of three authors, ranks 1 to 12, and one that cannot be used."""
    found = Catalogue(tmp_path / "lora.db")
    rows = [row(n, ranks={"q": n, "v": 1}, rank=n, downloads=100 - n % 4, likes=n) for n in range(1, 13)]
    found.add([*rows, replace(row(99, downloads=10**6, ranks={"q": 512}), status="unusable", reason="NaN")])
    return found


def chosen(catalogue: Catalogue, *, base: str | None = None, seed: int = 0, **options: Any) -> list[str]:
    found = select(catalogue, SelectOptions.of(**options), base=base, seed=seed, announce=silent)
    return [adapter.id for adapter, _ in found]


def test_random_depends_on_the_seed_and_on_nothing_else(catalogue: Catalogue) -> None:
    first = chosen(catalogue, by="random", k=12)
    assert sorted(first) != first
    assert len(set(first)) == 12
    assert chosen(catalogue, by="random", k=5) == first[:5]
    assert chosen(catalogue, by="random", k=12, seed=1) != first
    catalogue.add([row(50)])
    assert [id for id in chosen(catalogue, by="random", k=13) if not id.endswith("lora50")] == first


def test_rank_and_downloads_order_as_they_say(catalogue: Catalogue) -> None:
    assert chosen(catalogue, by="rank", k=3) == ["author0/lora12", "author2/lora11", "author1/lora10"]
    # Equal downloads: likes decide.
    assert chosen(catalogue, by="downloads", k=3) == ["author0/lora12", "author2/lora8", "author1/lora4"]


def test_restrictions_hold_together(catalogue: Catalogue) -> None:
    picked = chosen(catalogue, by="rank", k=10, max_per_author=2)
    assert len(picked) == 6
    assert all(sum(id.startswith(author) for id in picked) == 2 for author in ("author0", "author1", "author2"))
    assert chosen(catalogue, by="rank", k=9, where=["rank<=3", "author!=author0"]) == ["author2/lora2", "author1/lora1"]
    assert chosen(catalogue, by="rank", k=9, base="acme/tiny", where=["rank=7"]) == ["author1/lora7"]
    with pytest.raises(NothingMatched, match="no usable adapter of acme/other"):
        chosen(catalogue, base="acme/other")
    with pytest.raises(UsageError, match="needs --target"):
        chosen(catalogue, by="cosine")


def test_cosine_finds_the_direction_and_not_the_size(own_home: Path) -> None:
    target = random_factors(SHAPES, 4, seed=1)
    write_adapter(own_home / "target", target)
    near = {
        m: (3 * b + 0.3 * torch.randn(b.shape, generator=torch.Generator().manual_seed(5)), a)
        for m, (b, a) in target.items()
    }
    write_adapter(own_home / "pool" / "near", near, lora_alpha=1)
    write_adapter(own_home / "pool" / "opposite", {m: (-b, a) for m, (b, a) in target.items()})
    write_adapter(own_home / "pool" / "loud", random_factors(SHAPES, 4, seed=2), lora_alpha=400)
    ok("pool", "sync", "acme/tiny", "--from", "pool")
    told = ok("select", "--by", "cosine", "--target", "target", "-k", "3", "--json", "--name", "like-target")
    rows = json.loads(told.out)["rows"]
    assert [r["id"] for r in rows] == ["pool/near", "pool/loud", "pool/opposite"]
    assert rows[0]["score"] > 0.95
    assert rows[2]["score"] == pytest.approx(-1, abs=1e-6)
    assert "remembered as 'like-target'" in told.err
    assert ok("merge", "--selection", "like-target", "-o", "out").out == "out\n"
    assert "no adapter in this folder" in refused(3, "select", "--by", "cosine", "--target", "pool")
    assert "no selection called 'x'" in refused(3, "merge", "--selection", "x")


def test_an_adapter_that_cannot_be_read_does_not_stop_the_others(own_home: Path) -> None:
    for seed, name in enumerate(("target", "pool/a", "pool/b", "pool/cut", "pool/gone", "pool/nan")):
        write_adapter(own_home / name, random_factors(SHAPES, 2, seed=seed))
    ok("pool", "sync", "acme/tiny", "--from", "pool")
    nan = {m: (b * float("nan"), a) for m, (b, a) in random_factors(SHAPES, 2, seed=5).items()}
    for name in ("pool/gone", "pool/nan"):
        shutil.rmtree(own_home / name)
    write_adapter(own_home / "pool/nan", nan)
    weights = own_home / "pool/cut/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    told = ok("select", "--by", "cosine", "--target", "target", "-q")
    assert sorted(told.out.split()) == ["pool/a", "pool/b"]
    assert "pool/nan left out: NaN or Inf in layers.0.q_proj" in told.err
    assert "pool/cut left out: " in told.err
    assert "pool/gone left out: " in told.err
    write_adapter(own_home / "bad", nan)
    told = lora("select", "--by", "cosine", "--target", "bad")
    assert told.code == 5
    assert "left out" not in told.err
    shutil.rmtree(own_home / "pool")
    assert "no adapter whose weights can be read" in refused(3, "select", "--by", "cosine", "--target", "target")


def test_the_last_selection_is_what_merge_takes(own_home: Path) -> None:
    for seed, name in enumerate("abcd"):
        write_adapter(own_home / "pool" / name, random_factors(SHAPES, 2, seed=seed))
    ok("pool", "sync", "acme/tiny", "--from", "pool")
    told = ok("select", "--by", "random", "-k", "2", "-q")
    ids = told.out.split()
    assert len(ids) == 2
    merged = ok("merge", "-o", "out")
    assert "the last selection, 2 by random" in merged.err
    record = json.loads((own_home / "out" / "run.json").read_text())
    assert {pinned.partition("@")[0] for pinned in record["inputs"]} == set(ids)


def test_too_many_without_a_selection_names_the_command_that_selects(own_home: Path, catalogue: Catalogue) -> None:
    catalogue.add([row(n) for n in range(100, 160)])
    catalogue.close()
    message = refused(3, "merge", "--db", str(catalogue.path))
    assert "72 are usable" in message
    assert "lora select" in message


@pytest.mark.skipif(not WILD.is_dir(), reason="../shared/wild is not here")
def test_real_adapters_have_the_cosines_that_are_known_of_them() -> None:
    def opened(name: str):  # type: ignore[no-untyped-def]
        files = locate(folder_ref(WILD / name))
        assert files is not None
        return open_adapter(files)

    wei = opened("ao-wei__gemma3-270m-svg-lora-partb__adapter")
    twin = opened("ao-wei__gemma3-270m-svg-lora-partb__adapter_seed123")
    zouhe = opened("zouhe0__LLM-Homework__adapter")
    emotion = opened("justbautista__fine-tuning__emotion_lora_model")
    therapist = opened("justbautista__fine-tuning__therapist_lora_model")
    assert cosine([twin, zouhe], wei) == pytest.approx([0.998, 0.123], abs=5e-4)
    assert cosine([therapist], emotion) == pytest.approx([0.051], abs=5e-4)
    for adapter, norm in ((wei, 1.918), (twin, 1.915), (zouhe, 5.789), (emotion, 3.042), (therapist, 2.505)):
        total = sum(float(inner(u, u)) for u in map(adapter.read, adapter.modules))
        assert total**0.5 == pytest.approx(norm, abs=5e-4)
