"""Selections: what each method prefers, what restricts them, and that they are remembered."""

import json
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_cli.algebra.lowrank import inner
from lora_cli.catalogue.adapters import Catalogue
from lora_cli.errors import NothingMatched
from lora_cli.formats.reader import open_adapter
from lora_cli.formats.store import folder_ref, locate
from lora_cli.recipes import SelectOptions
from lora_cli.records import Adapter
from lora_cli.selection_methods.cosine import cosine
from lora_cli.steps.pool.by_weights import scored_by_weights
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


def test_candidates_are_scored_in_groups_and_progress_is_told(own_home: Path) -> None:
    for seed in range(18):
        write_adapter(own_home / f"pool/a{seed:02}", random_factors(SHAPES, 1, seed=seed))
    ok("pool", "sync", "acme/tiny", "--from", "pool", "--db", "lora.db")
    told: list[tuple[str, int, int]] = []
    with Catalogue(own_home / "lora.db") as catalogue:
        found = select(
            catalogue,
            SelectOptions.of(by="cosine", k=1),
            base=None,
            seed=0,
            announce=silent,
            scorer=partial(
                scored_by_weights,
                catalogue,
                "cosine",
                own_home / "pool/a17",
                (),
                silent,
                lambda *done: told.append(done),
            ),
        )
    assert [(adapter.id, round(score, 6)) for adapter, score in found] == [("pool/a17", 1.0)]
    assert told == [("comparing weights", done, 18) for done in (0, 16, 18)]


def explained(told: str) -> list[tuple[str, ...]]:
    """The lines of --explain as place, id, score, mark and reason."""
    return [tuple(cells) for line in told.splitlines() if len(cells := re.split(r"  +", line.strip())) == 5]


def test_explain_says_why_each_was_taken_and_why_the_next_ten_were_not(own_home: Path, catalogue: Catalogue) -> None:
    catalogue.add([replace(row(98), status="quarantined", reason="unusual"), row(97, base="acme/other")])
    catalogue.close()
    asked = ["--by", "rank", "-k", "3", "--max-per-author", "1", "--where", "rank>1", "--base", "acme/tiny"]
    told = ok("select", *asked, "--explain", "-q", "--db", str(catalogue.path))
    assert told.out.split() == ["author0/lora12", "author2/lora11", "author1/lora10"]
    lines = explained(told.err)
    assert lines[0] == ("1", "author0/lora12", "13", "taken", "number 1 of 11 by rank")
    assert lines[3] == ("4", "author0/lora9", "10", "not taken", "-k 3: the last one taken has 11")
    assert [line[3] for line in lines] == ["taken"] * 3 + ["not taken"] * 8
    assert "no candidate: 1 quarantined, 1 unusable, 1 of another base, 1 not fitting --where" in told.err
    silent = ok("select", *asked, "-q", "--db", str(catalogue.path))
    assert explained(silent.err) == []


def test_explain_tells_scores_apart_that_differ_by_a_second(own_home: Path, tmp_path: Path) -> None:
    with Catalogue(tmp_path / "other.db") as catalogue:
        catalogue.add([row(n, created_at=f"2026-11-30T04:00:0{n}+00:00", modified_at="") for n in range(3)])
        path = str(catalogue.path)
    lines = explained(ok(*f"select --by recent -k 1 --explain -q --db {path}".split()).err)
    assert [line[2] for line in lines] == ["1,796,011,202", "1,796,011,201", "1,796,011,200"]
    assert lines[1][4] == "-k 1: the last one taken has 1,796,011,202"


def test_explain_names_the_limit_per_author_and_the_hash_of_equal_scores(own_home: Path, tmp_path: Path) -> None:
    with Catalogue(tmp_path / "other.db") as catalogue:
        ranks = {1: 9, 2: 8, 3: 7, 4: 6, 5: 6}
        catalogue.add([row(n, author="one" if n < 4 else f"a{n}", ranks={"q": rank}) for n, rank in ranks.items()])
        path = str(catalogue.path)
    told = json.loads(ok(*f"select --by rank -k 2 --max-per-author 1 --explain --json --db {path}".split()).out)
    found = {one["id"]: (one["place"], one["taken"], one["why"]) for one in told["explained"]}
    limit = "--max-per-author 1: better ones of this author were taken"
    assert found["one/lora1"] == (1, True, "number 1 of 5 by rank")
    assert found["one/lora2"] == (2, False, limit)
    assert found["one/lora3"] == (3, False, limit)
    [last] = [one for one in told["explained"] if not one["id"].startswith("one/") and not one["taken"]]
    assert (last["place"], last["why"]) == (5, "the score of the last one taken; a hash of the names decided")
    assert told["outside"] == {}
    assert [one["id"] for one in told["rows"]] == ["one/lora1", ({"a4/lora4", "a5/lora5"} - {last["id"]}).pop()]


def test_explain_names_adapters_that_cannot_be_read(own_home: Path) -> None:
    for seed, name in enumerate(("target", "pool/a", "pool/nan")):
        write_adapter(own_home / name, random_factors(SHAPES, 2, seed=seed))
    ok("pool", "sync", "acme/tiny", "--from", "pool")
    shutil.rmtree(own_home / "pool/nan")
    told = json.loads(ok("select", "--by", "l2", "--target", "target", "--explain", "--json").out)
    last = told["explained"][-1]
    assert (last["id"], last["place"], last["score"], last["taken"]) == ("pool/nan", None, None, False)
    assert last["why"] == "left out: its folder is gone"


def test_recent_takes_the_later_date(tmp_path: Path) -> None:
    with Catalogue(tmp_path / "dates.db") as catalogue:
        dates = [
            ("2024-05-01T00:00:00.000Z", "2024-06-01T00:00:00.000Z"),
            ("2025-01-01T00:00:00.000Z", ""),
            ("", "2024-06-01T02:00:00+01:00"),
            ("", ""),
            ("yesterday", "2023-01-01T00:00:00"),
        ]
        catalogue.add([row(n, created_at=made, modified_at=changed) for n, (made, changed) in enumerate(dates)])
        found = select(catalogue, SelectOptions.of(by="recent"), base=None, seed=0, announce=silent)
    assert [adapter.id[-1] for adapter, _ in found] == ["1", "2", "0", "4", "3"]
    assert [score for _, score in found] == [1735689600, 1717203600, 1717200000, 1672531200, 0]


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
