"""`--valid` of fit and train: the user's own validation examples in place of a part of the data."""

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from lora_cli.models.ref import load
from lora_cli.task import load_task
from lora_cli.world import World
from tests.cli import ok, refused
from tests.commands.test_fit_commands import here, record
from tests.tiny_bases import opened

__all__ = ["here"]
pytestmark = pytest.mark.usefixtures("one_thread")
ONE = ("fit", "pool/kestrel/outer", "--steps", "5", "--init", "average")


@pytest.fixture
def files(here: World) -> tuple[Path, Path]:
    """The task in two files, whose ids are alike, as they are the numbers of lines."""
    rows = [json.loads(line) for line in Path("task.jsonl").read_text().splitlines()]
    return write("learn.jsonl", rows[:30]), write("valid.jsonl", rows[30:42])


def write(name: str, rows: Sequence[Any]) -> Path:
    plain = [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows]
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in plain))
    return Path(name)


def loss(base: Path, folder: str, task: Path) -> float:
    """The mean loss of every example of a task by an adapter."""
    model, adapter = load(str(base)), opened(Path(folder))
    with model.applied({module: adapter.read(module) for module in adapter.modules}):
        each = model.log_likelihoods(load_task(task))
    return -sum(each) / len(each)


def test_a_fit_learns_from_one_file_and_is_judged_on_the_other(here: World, files: tuple[Path, Path]) -> None:
    told = ok(*ONE, "--data", "learn.jsonl", "--valid", "valid.jsonl", "--control", "target", "-o", "own")
    words = "fit: 30 examples of learn.jsonl to learn from, 12 of valid.jsonl to choose the best step; base"
    assert words in told.err
    assert "warning" not in told.err
    found = record("own")
    assert (found["results"]["n_train"], found["results"]["n_validation"]) == (30, 12)
    assert found["settings"]["valid"] == "valid.jsonl"
    assert found["inputs"]["valid:valid.jsonl"] == sha256(files[1].read_bytes()).hexdigest()
    assert found["results"]["loss_merged"] == pytest.approx(loss(here.base, "own", files[1]), rel=1e-4)
    assert (
        "up to date"
        in ok(*ONE, "--data", "learn.jsonl", "--valid", "valid.jsonl", "--control", "target", "-o", "own").err
    )

    # What is learnt depends on the one file alone, and what is chosen on the other.
    ok(*ONE, "--data", "learn.jsonl", "--valid", "learn.jsonl", "--checkpoint", "last", "-o", "same")
    ok(*ONE, "--data", "learn.jsonl", "--valid", "valid.jsonl", "--checkpoint", "last", "-o", "other")
    weights = "adapter_model.safetensors"
    assert Path("same", weights).read_bytes() == Path("other", weights).read_bytes()
    assert record("same")["key"] != record("other")["key"]
    assert record("same")["results"]["loss"] != record("other")["results"]["loss"]


def test_a_changed_validation_file_is_other_work(here: World, files: tuple[Path, Path]) -> None:
    words = (*ONE, "--data", "learn.jsonl", "--valid", "valid.jsonl", "-o", "own")
    ok(*words)
    write("valid.jsonl", [{"prompt": "a", "completion": "b"}])
    assert "own exists" in refused(1, *words)


def test_a_lora_is_trained_with_them_too(here: World, files: tuple[Path, Path]) -> None:
    told = ok("train", "--rank", "2", "--steps", "4", "--lr", "5e-3", "--data", "learn.jsonl", "--valid", "valid.jsonl",
              "-o", "new")  # fmt: skip
    assert "train: 30 examples of learn.jsonl to learn from, 12 of valid.jsonl to choose the best step" in told.err
    found = record("new")
    assert (found["results"]["n_train"], found["results"]["n_validation"]) == (30, 12)
    assert found["results"]["loss"] == pytest.approx(loss(here.base, "new", files[1]), rel=1e-4)
    # All of the data was learnt, and nothing of the other file.
    quick = ("--metric", "nll", "--json")
    rows = json.loads(ok("eval", "new", "--data", "learn.jsonl", *quick).out)["rows"]
    assert rows[1]["details"]["trained_on"] == 30
    rows = json.loads(ok("eval", "new", "--data", "valid.jsonl", *quick).out)["rows"]
    assert rows[1]["details"]["trained_on"] == 0


def test_without_test_data_eval_takes_the_validation_file_of_the_last_fit(
    here: World, files: tuple[Path, Path]
) -> None:
    lines = Path("lora.toml").read_text().splitlines(keepends=True)
    Path("lora.toml").write_text("".join(line for line in lines if not line.startswith("test")))
    ok(*ONE, "--data", "learn.jsonl", "--valid", "valid.jsonl", "-o", "own")
    rows = json.loads(ok("eval", "own", "--metric", "nll", "--json").out)["rows"]
    assert rows[1]["value"] == pytest.approx(record("own")["results"]["loss_merged"], rel=1e-4)
    assert rows[1]["n"] == 12
    files[1].unlink()
    assert "valid.jsonl, the data of the last fit, is not in this folder or has changed" in refused(1, "eval", "own")


def test_one_example_is_enough_where_none_is_held_out(here: World) -> None:
    write("one.jsonl", [{"prompt": "a", "completion": "b"}])
    assert "--valid FILE" in refused(1, *ONE, "--data", "one.jsonl")
    ok(*ONE, "--data", "one.jsonl", "--valid", "task.jsonl", "--dry-run")
    ok(*ONE, "--data", "one.jsonl", "--valid", "task.jsonl", "-o", "one")


def test_faults_of_the_validation_file_name_it(here: World, files: tuple[Path, Path]) -> None:
    common = (*ONE, "--data", "learn.jsonl", "--valid")
    assert "no such file: gone.jsonl" in refused(1, *common, "gone.jsonl")
    Path("bad.jsonl").write_text("{}\n")
    assert "bad.jsonl:1: neither of the two formats" in refused(1, *common, "bad.jsonl")
    Path("empty.jsonl").write_text("")
    assert "empty.jsonl: the file is empty" in refused(1, *common, "empty.jsonl")
    write("long.jsonl", [{"prompt": "a b " * 3000, "completion": "b"}])
    assert "long.jsonl: " in refused(1, *common, "long.jsonl")


def test_prompts_of_both_files_are_counted(here: World, files: tuple[Path, Path]) -> None:
    rows = [json.loads(line) for name in files for line in name.read_text().splitlines()]
    write("overlap.jsonl", rows[28:40])
    told = ok(*ONE, "--data", "learn.jsonl", "--valid", "overlap.jsonl", "-o", "own")
    assert "warning: 2 validation prompts are also training prompts" in told.err


def test_what_a_search_tells_of_each_file_is_what_eval_finds(here: World, files: tuple[Path, Path]) -> None:
    two = (
        "fit",
        "pool/kestrel/outer",
        "pool/tarn/mirror",
        "--preset",
        "lorahub",
        "--evaluations",
        "8",
        "--rank",
        "sum",
    )
    ok(*two, "--data", "learn.jsonl", "--valid", "valid.jsonl", "-o", "own")
    objective = record("own")["results"]["objective"]
    for part, file in (("training", "learn.jsonl"), ("validation", "valid.jsonl")):
        rows = json.loads(ok("eval", "own", "--data", file, "--metric", "nll", "--json").out)["rows"]
        assert [row["value"] for row in rows] == pytest.approx(
            [objective[part]["start"], objective[part]["best"]], rel=1e-3
        )
