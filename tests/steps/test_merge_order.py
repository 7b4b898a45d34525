"""A merge whose method depends on the order of adapters: the order is kept, recorded, locked, and part of the key."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.adapters_on_disk import random_factors, write_adapter
from tests.cli import ok, refused

SHAPES = {f"model.layers.{i}.mlp.up_proj": (24, 16) for i in range(2)}
BYTES = ("adapter_model.safetensors", "run.json")


@pytest.fixture(autouse=True)
def three(own_home: Path) -> None:
    for seed, name in enumerate(("one", "two", "three")):
        write_adapter(own_home / name, random_factors(SHAPES, 3, seed=seed))


def merged(out: str, *adapters: str, method: str = "orthogonal") -> dict[str, Any]:
    ok("merge", *adapters, "-m", method, "-o", out)
    record: dict[str, Any] = json.loads(Path(out, "run.json").read_text())
    return record


def bytes_of(folder: str) -> list[bytes]:
    return [Path(folder, name).read_bytes() for name in BYTES]


def test_the_order_given_is_the_order_of_the_merge() -> None:
    there = merged("there", "one", "two", "three")
    back = merged("back", "three", "two", "one")
    assert [name.partition("@")[0].rpartition("/")[2] for name in there["settings"]["order"]] == ["one", "two", "three"]
    assert back["settings"]["order"] == there["settings"]["order"][::-1]
    assert back["key"] != there["key"]
    assert back["outputs"] != there["outputs"]


def test_another_method_has_no_order() -> None:
    there, back = (
        merged(out, *names, method="linear") for out, names in (("a", ("one", "two")), ("b", ("two", "one")))
    )
    assert "order" not in there["settings"]
    assert there == back


def test_a_lock_keeps_the_order() -> None:
    merged("first", "three", "one", "two")
    ok("merge", "--locked", "first/run.json", "-o", "again")
    assert bytes_of("again") == bytes_of("first")
    ok("merge", "two", "one", "three", "--locked", "first/run.json", "-o", "named")
    assert bytes_of("named") == bytes_of("first")


def test_a_lock_whose_order_names_others_is_no_lock() -> None:
    record = merged("first", "one", "two")
    record["settings"]["order"][0] = "stranger@1"
    Path("first/run.json").write_text(json.dumps(record))
    assert "not the run.json of a merge" in refused(1, "merge", "--locked", "first/run.json", "-o", "again")
