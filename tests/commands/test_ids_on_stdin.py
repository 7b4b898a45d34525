"""`lora pool list -q | lora … -` takes every id that a catalogue can hold."""

import json
from pathlib import Path

import pytest

from lora_cli.catalogue.adapters import Catalogue
from lora_cli.errors import NothingMatched, UsageError
from lora_cli.records import Adapter
from lora_cli.steps.opened_pool import Pool
from tests.adapters_on_disk import random_factors, write_adapter
from tests.cli import ok, refused
from tests.fake_hub import lora_files

HOSTILE = (
    "two words", " led by a space", "-o", "--force", "#1", "#", '"quoted"', "it's", "new\nline", "tab\tbed",
    "\x1b[31mred", "back\\slash", "\\x1b", "half@beef", "run=2", "run=x", "a=1=2", "{brace}", '{"id": "x"}',
    "filler\u3164", "é", "日本語", "e\u0301", "\u202eevil", "\ufeffmark", "a:b", "a@1234:b", "*", "~", "$(true)", "a,b",
    "%", "x" * 200,
)  # fmt: skip


@pytest.fixture
def pool(own_home: Path) -> Path:
    for place, name in enumerate(HOSTILE):
        # Another value for each, so that every adapter has a commit of its own.
        folder = own_home / "elsewhere" / "pool" / name
        folder.mkdir(parents=True)
        for file, data in lora_files(value=0.1 + place / 100).items():
            (folder / file).write_bytes(data)
    ok("pool", "sync", "--from", "elsewhere/pool", "-q")
    return own_home / "elsewhere" / "pool"


@pytest.mark.parametrize("form", ["--quiet", "--jsonl"])
def test_the_ids_of_a_list_are_taken_by_every_command(pool: Path, own_home: Path, form: str) -> None:
    every = {f"pool/{name}" for name in HOSTILE}
    listed = ok("pool", "list", form, "--where", "status=ok").out
    assert all(line.isprintable() for line in listed.splitlines())
    verified = json.loads(ok("pool", "verify", "-", "--json", stdin=listed).out)
    assert {row["id"] for row in verified["rows"]} == every
    fetched = json.loads(ok("pool", "fetch", "-", "--json", stdin=listed).out)
    assert {row["id"] for row in fetched["rows"]} == every
    ok("merge", "-", "-m", "linear", "-o", "out", stdin=listed)
    merged = json.loads((own_home / "out" / "run.json").read_text())["inputs"]
    assert {name.rpartition("@")[0] for name in merged if not name.startswith("base:")} == every
    ok("pool", "rm", "-", stdin=listed)
    refused(3, "pool", "list", "-q", "--where", "status=ok")


def test_a_name_with_two_meanings_is_refused_and_a_commit_tells_them_apart(tmp_path: Path) -> None:
    """An adapter called like another one with a weight or a commit never takes its place."""
    commit = "beef" + "0" * 36
    names = ("run", "run@beef", f"run@{commit}", "run=2")
    with Catalogue(tmp_path / "catalogue.db") as catalogue:
        catalogue.add(
            [
                Adapter(id=name, commit=commit if name == "run" else "a" * 40, source="folder", repo=f"/{name}")
                for name in names
            ]
        )
        assert catalogue.named("run").id == "run"
        assert catalogue.named(f"run@{commit}").id == "run"
        with pytest.raises(NothingMatched, match="run@beef is the name of one adapter and the commit of another"):
            catalogue.named("run@beef")
        for name in names[1:]:
            assert catalogue.named(f"{name}@{'a' * 40}").id == name
        pool = Pool(catalogue=catalogue, announce=print)
        with pytest.raises(UsageError, match="run=2 is the name of one adapter and a weight of another"):
            pool.chosen(["run=2"])
        found = pool.chosen(["run=3", "run=2=1", f"run=2@{'a' * 40}"])
    assert found.names == ("run", "run=2", f"run=2@{'a' * 40}")
    assert found.weights == (3.0, 1.0, None)


@pytest.mark.parametrize("command", ["merge - -o x", "pool similarity -", "pool verify -", "pool rm -"])
def test_nothing_on_stdin_is_no_last_selection(own_home: Path, command: str) -> None:
    for name in ("a", "b"):
        write_adapter(own_home / "pool" / name, random_factors({"model.layers.0.mlp.up_proj": (8, 8)}, 2, seed=0))
    ok("pool", "sync", "--from", "pool")
    ok("select", "--by", "random", "-k", "2")
    assert "no ids on stdin" in refused(3, *command.split(), stdin="\n")
