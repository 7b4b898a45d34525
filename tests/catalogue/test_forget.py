"""What a user wants to be rid of: rows of adapters, selections and runs; what they stand for stays."""

import json
from pathlib import Path

from tests.adapters_on_disk import random_factors, write_adapter
from tests.cli import ok, refused

SHAPES = {"model.layers.0.self_attn.q_proj": (16, 16)}


def pool(here: Path) -> list[str]:
    """Three adapters, catalogued; returns their ids."""
    for seed, name in enumerate(("a", "b", "c")):
        write_adapter(here / "pool" / name, random_factors(SHAPES, 2, seed=seed))
    ok("pool", "sync", "--from", "pool")
    return ok("pool", "list", "-q").out.splitlines()


def test_an_adapter_is_forgotten_and_its_files_stay(own_home: Path) -> None:
    a, b, c = pool(own_home)
    ok("select", "-k", "3", "--name", "all", "--base", "acme/tiny")
    assert ok("pool", "rm", a, b, "--dry-run").out.splitlines() == [a, b]
    assert len(ok("pool", "list", "-q").out.splitlines()) == 3
    assert "forgot 2 adapters" in ok("pool", "rm", a, b, a).err
    assert ok("pool", "list", "-q").out.splitlines() == [c]
    assert (own_home / "pool" / "a" / "adapter_model.safetensors").is_file()
    [row] = json.loads(ok("pool", "selections", "--json").out)["rows"]
    assert (row["name"], row["adapters"]) == ("all", 1)
    assert "not in the catalogue" in refused(3, "pool", "rm", a)
    ok("pool", "sync", "--from", "pool")
    assert len(ok("pool", "list", "-q").out.splitlines()) == 3


def test_nothing_is_forgotten_where_one_of_the_names_is_wrong(own_home: Path) -> None:
    a, *_ = pool(own_home)
    refused(3, "pool", "rm", a, "pool/none")
    assert a in ok("pool", "list", "-q").out


def test_selections_are_listed_and_dropped_by_name_or_number(own_home: Path) -> None:
    pool(own_home)
    for name in ("first", "second", "first"):
        ok("select", "-k", "1", "--name", name, "--base", "acme/tiny")
    rows = json.loads(ok("pool", "selections", "--json").out)["rows"]
    assert [row["name"] for row in rows] == ["first", "second", "first"]
    assert "dropped 2 selections" in ok("pool", "selections", "--drop", "first").err
    assert "no selection 'first'" in refused(3, "pool", "selections", "--drop", "first")
    ok("pool", "selections", "--drop", str(rows[1]["id"]))
    assert json.loads(ok("pool", "selections", "--json").out)["rows"] == []


def test_a_run_is_forgotten_and_its_output_stays(own_home: Path) -> None:
    a, b, _ = pool(own_home)
    ok("merge", a, b, "-m", "linear", "-o", "out")
    ok("merge", a, b, "-m", "ties", "-o", "other")
    runs = ok("runs", "list", "-q").out.splitlines()
    assert "more than one run" in refused(3, "runs", "rm", runs[0][:4])
    assert "forgot 1 run" in ok("runs", "rm", runs[0]).err
    assert ok("runs", "list", "-q").out.splitlines() == runs[1:]
    assert (own_home / "other" / "run.json").is_file()
