"""`lora fit --preset` as a user types it: what differs from the default's way."""

import json
from pathlib import Path

import pytest

from lora_cli.world import World
from tests.cli import ok, refused
from tests.commands.test_fit_commands import here, record

__all__ = ["here"]
pytestmark = pytest.mark.usefixtures("one_thread")


def test_trained_adapters_fold_into_one_lora_and_their_coefficients_fit_no_others(here: World) -> None:
    ok("train", "--rank", "2", "--steps", "4", "--lr", "5e-3", "-o", "mine")
    options = ("--preset", "pi-tuning", "--target", "mine", "--steps", "10", "--lr", "5e-3", "--rank", "sum")
    folder = Path(ok("fit", "pool/tarn/mirror", "pool/kestrel/outer", *options, "-o", "tuned").out.strip())
    found = record(folder)
    assert (found["settings"]["preset"], found["settings"]["redraw"]) == ("pi-tuning", "target")
    assert found["results"]["loss_merged"] == pytest.approx(found["results"]["loss"], rel=1e-4)
    assert found["results"]["loss"] < 0.9 * found["results"]["comparisons"][0]["loss"]
    coefficients = json.loads((folder / "coefficients.json").read_text())
    assert coefficients["trained"] is True
    assert coefficients["adapters"][0].startswith(f"{here.folder.name}/mine@")
    told = refused(5, "merge", "mine", "pool/tarn/mirror", "pool/kestrel/outer", "--coef", "tuned/coefficients.json")
    assert "belong to factors that the fit trained" in told


def test_lorahub_draws_records_and_counts_evaluations(here: World) -> None:
    told = ok("fit", "--preset", "lorahub", "--evaluations", "12", "-o", "hub", "--plot", "hub.svg")
    assert "best by evaluation" in told.err
    found = record("hub")
    assert (found["settings"]["evaluations"], found["settings"]["seed"]) == (12, 0)
    assert "steps" not in found["settings"]
    assert found["results"]["loss_merged"] == pytest.approx(found["results"]["loss"], rel=1e-3)
    assert found["results"]["curve"][-1]["step"] == 12
    weights = json.loads(Path("hub/coefficients.json").read_text())["values"]
    assert {len({row[place][0] for row in weights.values()} - {0.0}) for place in range(4)} == {1}
    first = Path("hub/adapter_model.safetensors").read_bytes()
    ok("fit", "--preset", "lorahub", "--evaluations", "12", "-o", "again")
    assert Path("again/adapter_model.safetensors").read_bytes() == first


def test_an_entropy_needs_no_answers(here: World) -> None:
    rows = [json.loads(line) for line in Path("task.jsonl").read_text().splitlines()]
    bare = [{"id": row["id"], "prompt": row["prompt"]} for row in rows]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bare))
    options = ("fit", "--preset", "adamerging", "--objective", "entropy", "--steps", "10")
    told = ok(*options, "--data", "prompts.jsonl", "-o", "bare")
    assert "fit: validation entropy" in told.err
    assert "the base, whose entropy is " in told.err
    found = record("bare")["results"]
    assert found["loss"] < 0.9 * found["curve"][0]["validation"]
    ok(*options, "-o", "answered")
    weights = "adapter_model.safetensors"
    assert Path("bare", weights).read_bytes() == Path("answered", weights).read_bytes()
    assert "neither of the two formats" in refused(1, "fit", "--data", "prompts.jsonl")
    assert "--objective entropy does not read" in refused(2, *options, "--control", "target")


def test_the_last_step_is_kept_when_asked(here: World) -> None:
    told = ok("fit", "--preset", "paper-2602.12323", "--steps", "5", "-o", "paper")
    assert "as of step 5" in told.err
    found = record("paper")
    assert (found["settings"]["checkpoint"], found["results"]["best_step"]) == ("last", 5)
    assert found["results"]["loss"] == found["results"]["curve"][-1]["validation"]


def test_a_preset_refuses_what_it_has_no_use_for(here: World) -> None:
    assert "lorahub takes no --steps" in refused(2, "fit", "--preset", "lorahub", "--steps", "10")
    assert "preset cat takes no --init" in refused(2, "fit", "--preset", "cat", "--init", "zero")
    assert "did you mean 'lorahub'" in refused(2, "fit", "--preset", "lorahubs")


def test_a_target_that_was_drawn_anew_for_nothing_is_said(here: World) -> None:
    ok("train", "--rank", "2", "--steps", "2", "-o", "mine")
    options = ("--preset", "pi-tuning", "--target", "mine", "--steps", "2", "--lr", "100")
    told = refused(5, "fit", "pool/tarn/mirror", *options)
    assert "the target's new factors stay 0" in told
    assert "--redraw none" in told
