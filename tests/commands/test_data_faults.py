"""What users meet with their task: examples learnt before, answers of one class, prompts without room, one example."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lora_cli.task import load_task, split
from tests.adapters_on_disk import random_factors, write_adapter
from tests.cli import ok, refused
from tests.tiny_bases import saved

pytestmark = pytest.mark.usefixtures("one_thread")


def write(name: str, *lines: dict[str, Any]) -> None:
    Path(name).write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def here(own_home: Path) -> Path:
    """A working folder with a base, an adapter, and settings that name the base."""
    saved(own_home / "base")
    write_adapter(own_home / "some", random_factors({"model.layers.0.mlp.up_proj": (48, 32)}, 2, seed=0), base="base")
    Path("lora.toml").write_text('base = "base"\n')
    return own_home


def test_examples_that_an_adapter_learnt_are_counted(here: Path) -> None:
    lines = [{"prompt": f"p{number}", "completion": f"c{number}"} for number in range(12)]
    write("task.jsonl", *lines)
    learnt, held = split(load_task(Path("task.jsonl")), seed=3)
    of_old = [{"prompt": e.prompt, "completion": "new", "id": f"x{e.id}"} for e in [*learnt[:4], held[0]]]
    write("test.jsonl", *of_old, {"prompt": "q", "completion": "a"})
    ok("train", "--data", "task.jsonl", "--seed", "3", "--steps", "1", "--rank", "2", "-o", "trained")
    quick = ("--data", "test.jsonl", "--metric", "nll", "--json")
    told = ok("eval", "trained", "some", *quick)
    assert "warning: 4 of 6 examples were trained on by trained, which flatters its score" in told.err
    assert "by some" not in told.err
    details = {row["system"]: row["details"] for row in json.loads(told.out)["rows"]}
    assert details["trained"]["trained_on"] == 4
    assert "trained_on" not in details["some"]

    record = json.loads(Path("trained/run.json").read_text())
    Path("elsewhere").mkdir()
    shutil.move("task.jsonl", "elsewhere/task.jsonl")
    gone = "note: task.jsonl, on which trained was trained, is not here to be compared with this data"
    assert gone in ok("eval", "trained", *quick).err
    # The record of a stranger's folder leads to no file elsewhere.
    record["inputs"]["elsewhere/task.jsonl"] = record["inputs"].pop("task.jsonl")
    record["settings"]["data"] = "elsewhere/task.jsonl"
    Path("trained/run.json").write_text(json.dumps(record))
    told = ok("eval", "trained", *quick)
    assert gone in told.err
    assert json.loads(told.out)["rows"][1]["details"]["trained_on"] is None
    Path("trained/run.json").write_text("{}")
    assert "was trained" not in ok("eval", "trained", *quick).err


def test_answers_of_one_class_are_pointed_out_with_the_score_of_a_constant(here: Path) -> None:
    choices = {"choices": ["yes", "no", "maybe"]}
    answers = ["yes", "no", "Yes.", "maybe", "yes", "no"]
    write("mixed.jsonl", *({"prompt": f"p{n}", "completion": a} for n, a in enumerate(answers)))
    told = ok("eval", "some", "--data", "mixed.jsonl", "--max-new-tokens", "2", "--json")
    assert "eval: always answering 'yes' would score 0.500\n" in told.err
    assert "warning: 50 %" not in told.err
    document = json.loads(told.out)
    assert (document["usual_answer"], document["usual_share"]) == ("yes", 0.5)

    write("one.jsonl", *({"prompt": f"p{n}", "completion": "yes", **choices} for n in range(3)))
    told = ok("eval", "some", "--data", "one.jsonl", "--metric", "choice")
    assert "warning: 100 % of the answers are 'yes': a model that gives no other answer seems good" in told.err
    assert "always answering 'yes' would score 1.000" in told.err
    assert "always answering" not in ok("eval", "some", "--data", "one.jsonl", "--metric", "nll").err
    write("all.jsonl", *({"prompt": f"p{n}", "completion": f"c{n}"} for n in range(3)))
    assert "always answering" not in ok("eval", "some", "--data", "all.jsonl", "--max-new-tokens", "1").err


def test_prompts_without_room_are_all_counted_before_the_first_row(here: Path) -> None:
    # The base takes 64 tokens; the chat template adds three to a prompt.
    write("long.jsonl", *({"prompt": "x" * n, "completion": "y"} for n in (5, 40, 45, 50, 59, 70)))
    told = refused(1, "eval", "some", "--data", "long.jsonl", "-o", "rows.jsonl")
    assert (
        "takes 64 tokens; 5 of 6 examples have more with 30 new ones: 2 (73), 3 (78), 4 (83), 5 (92), 6 (103)" in told
    )
    assert "lower --max-new-tokens, or shorten or remove them" in told
    assert not Path("rows.jsonl").exists()
    told = refused(1, "eval", "some", "--data", "long.jsonl", "--metric", "nll", "-o", "rows.jsonl")
    assert "takes 64 tokens; 1 of 6 examples has more: 6 (75)" in told
    assert "shorten or remove it" in told
    assert not Path("rows.jsonl").exists()
    write("options.jsonl", {"prompt": "x", "completion": "y", "choices": ["y", "z" * 70]})
    told = refused(1, "eval", "some", "--data", "options.jsonl", "--metric", "choice")
    assert "1 of 1 example has more: 1 (75)" in told
    assert "1 of 6 examples has more: 6 (75)" in refused(1, "train", "--data", "long.jsonl", "--steps", "1")


def test_one_example_is_refused_before_the_base_is_loaded(here: Path) -> None:
    write("one.jsonl", {"prompt": "p", "completion": "c"})
    Path("base/model.safetensors").unlink()
    for words in (("fit", "some"), ("train",)):
        assert "one example cannot be split" in refused(1, *words, "--data", "one.jsonl")


def test_two_examples_are_enough(here: Path) -> None:
    write("two.jsonl", {"prompt": "p", "completion": "c"}, {"prompt": "q", "completion": "d"})
    assert "1 validation example ·" in ok("fit", "some", "--data", "two.jsonl", "--steps", "1", "-o", "fitted").err
    ok("train", "--data", "two.jsonl", "--steps", "1", "--rank", "1", "-o", "trained")
    card = Path("trained/README.md").read_text()
    assert "trained on 1 example. Validation loss on 1 other: " in card
    assert "changed the output on" in ok("eval", "some", "--data", "two.jsonl", "--max-new-tokens", "2").err
