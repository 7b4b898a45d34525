"""Sketches in the catalogue: copies are named and left out, a rerun measures nothing again, the report has a map."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.adapters_on_disk import random_factors, write_adapter
from tests.cli import lora, ok, refused

SHAPES = {f"model.layers.{layer}.self_attn.q_proj": (32, 32) for layer in range(3)}


@pytest.fixture
def pool(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An adapter, its copy, one that nearly equals it, and two of their own."""
    monkeypatch.setenv("LORA_BASE", "acme/tiny")
    for name, seed in (("first", 0), ("same", 0), ("near", 0), ("second", 1), ("third", 2)):
        factors = random_factors(SHAPES, 4, seed=seed)
        if name == "near":
            noise = random_factors(SHAPES, 4, seed=9)
            factors = {module: (b + 0.02 * noise[module][0], a) for module, (b, a) in factors.items()}
        write_adapter(own_home / "pool" / name, factors, base="acme/tiny")
    ok("pool", "sync", "--from", "pool")
    return own_home / "pool"


def verified(*words: str) -> dict[str, dict[str, object]]:
    ids = ok("pool", "list", "-q").out.split()
    rows = json.loads(ok("pool", "verify", *ids, "--deep", "--json", *words).out)["rows"]
    return {row["id"].removeprefix("pool/"): row for row in rows}


def test_copies_are_named_and_left_out(pool: Path) -> None:
    chosen = lora("select", "--by", "random", "--dedupe", "0.95", "-q")
    assert len(chosen.out.split()) == 4
    assert "left out 0 near copies and 1 of the same weights; 4 adapters without a sketch" in chosen.err
    rows = verified()
    assert {rows[name]["copy_of"] for name in ("second", "third")} == {None}
    assert {rows["first"]["copy_of"], rows["same"]["copy_of"]} == {"pool/first", "pool/same"}
    assert rows["near"]["copy_of"] in ("pool/first", "pool/same")
    assert 0.95 < float(str(rows["near"]["copy_cosine"])) < 1
    chosen = lora("select", "--by", "random", "--dedupe", "0.95", "-q")
    taken = {id.removeprefix("pool/") for id in chosen.out.split()}
    assert len(taken) == 3
    assert taken > {"second", "third"}
    assert "--dedupe 0.95: left out 1 near copy and 1 of the same weights" in chosen.err
    assert len(ok("select", "--dedupe", "1", "-q").out.split()) == 4, "a cosine of 1 leaves the near one in"
    assert "--dedupe is a cosine" in refused(2, "select", "--dedupe", "1.5")
    told = lora("select", "--dedupe", "0.95", "--explain", "-q").err
    assert told.count("--dedupe 0.95: a copy of a better one") == 2


def test_a_sync_counts_near_copies_among_the_sketched(pool: Path) -> None:
    def figures() -> tuple[int, int]:
        report = json.loads(ok("pool", "sync", "--from", "pool", "--json").out)
        return report["near_copies"], report["sketched"]

    write_adapter(pool / "fourth", random_factors(SHAPES, 4, seed=3), base="acme/tiny")
    assert figures() == (0, 0)
    verified()
    write_adapter(pool / "fifth", random_factors(SHAPES, 4, seed=3), base="acme/tiny")
    assert figures() == (3, 6), "the fifth has no sketch yet"
    assert "near copies" in ok("pool", "verify", "--deep").err, "without ids, all whose weights are here"
    write_adapter(pool / "sixth", random_factors(SHAPES, 4, seed=4), base="acme/tiny")
    assert figures() == (5, 7)


def test_a_rerun_measures_nothing_again_but_what_has_changed(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lora_cli.checks.sketch as room

    made: list[Path] = []
    ours = room.sketch

    def counted(path: Path, *rest: object) -> object:
        made.append(path)
        return ours(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(room, "sketch", counted)
    first = verified()
    assert len(made) == 5
    again = verified()
    for name, row in again.items():
        # Measures are stored in single precision.
        for measure in ("norm", "effective_rank"):
            assert row.pop(measure) == pytest.approx(first[name][measure], rel=1e-6)
        assert row == {key: value for key, value in first[name].items() if key in row}
    assert len(made) == 5
    shutil.rmtree(pool / "third")
    write_adapter(pool / "third", random_factors(SHAPES, 4, seed=7), base="acme/tiny")
    ok("pool", "sync", "--from", "pool")
    assert verified()["third"]["norm"] != first["third"]["norm"]
    assert made[5:] == [pool / "third" / "adapter_model.safetensors"]
    verified("--force")
    assert len(made) == 11


def test_a_fault_of_one_adapter_is_its_verdict_and_the_others_are_checked(
    pool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lora_cli.checks.sketch as room
    from lora_cli.errors import Refused

    ours = room.sketch

    def failing(path: Path, *words: Any) -> Any:
        if path.parent.name == "second":
            raise Refused("pool/second: NaN or Inf in its update")
        return ours(path, *words)

    monkeypatch.setattr(room, "sketch", failing)
    told = lora("pool", "verify", *ok("pool", "list", "-q").out.split(), "--deep", "--json")
    rows = {row["id"]: row for row in json.loads(told.out)["rows"]}
    assert told.code == 5
    assert (rows["pool/second"]["status"], rows["pool/second"]["reason"]) == ("unusable", "NaN or Inf in its update")
    assert [row["status"] for id, row in rows.items() if id != "pool/second"] == ["ok"] * 4


def test_norms_outside_the_bounds_are_refused_or_noted(pool: Path) -> None:
    norm = float(str(verified()["second"]["norm"]))
    told = lora("pool", "verify", "pool/second", "--deep", "--max-norm", str(norm / 2))
    assert (told.code, f"above {norm / 2:g}" in told.err) == (5, True)
    assert "--min-norm must be below --max-norm" in refused(
        2, "pool", "verify", "pool/second", "--deep", "--min-norm", "2", "--max-norm", "1"
    )


def test_the_report_maps_sketched_adapters_near_ones_alike(pool: Path) -> None:
    ok("pool", "report", "-o", "before.html")
    assert "No three usable adapters have a sketch" in Path("before.html").read_text()
    verified()
    ok("pool", "report", "-o", "after.html")
    page = Path("after.html").read_text()
    places = {
        name: (float(x), float(y))
        for x, y, name in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"[^>]*><title>pool/(\w+)', page)
    }
    assert places.keys() == {"first", "same", "near", "second", "third"}
    assert places["first"] == places["same"]
    # A name that would lie on another is left out.
    assert re.findall(r"<text [^>]*>pool/(\w+)</text>", page) == ["first", "second", "third"]

    def apart(one: str, other: str) -> float:
        (x, y), (u, v) = places[one], places[other]
        return float(((x - u) ** 2 + (y - v) ** 2) ** 0.5)

    assert apart("first", "near") < 0.1 * apart("first", "second")
    assert apart("second", "third") > 100
