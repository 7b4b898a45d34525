"""`lora fit`, `lora train` and `lora eval` as a user types them, in the small world."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_cli.world import World
from tests import readers
from tests.cli import lora, ok, refused
from tests.steps.test_merge import close
from tests.tiny_bases import STORIES, needs_stories

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = ("--steps", "20")


@pytest.fixture
def here(own_world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """The user stands in a world of their own, whose pool is catalogued."""
    monkeypatch.chdir(own_world.folder)
    monkeypatch.delenv("LORA_DB")
    ok("pool", "sync")
    return own_world


def record(folder: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(folder, "run.json").read_text())
    return found


@pytest.mark.slow
def test_the_literal_lines_of_the_tour(here: World) -> None:
    ok("merge", "--method", "ties")
    fitted = ok("fit", "--data", "task.jsonl")
    folder = Path(fitted.out.strip())
    assert "adapters: all 4 usable ones" in fitted.err
    assert "100 examples of task.jsonl, split 80/20 by seed 0" in fitted.err
    assert "gain over the base" in fitted.err
    assert sorted(file.name for file in folder.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "coefficients.json", "run.json", "trace.jsonl",
    ]  # fmt: skip
    assert not list(folder.parent.glob(".*"))
    coefficients = json.loads((folder / "coefficients.json").read_text())
    assert coefficients["base"] == here.base_name
    assert str(here.folder) not in json.dumps([coefficients, record(folder)])
    place = next(i for i, name in enumerate(coefficients["adapters"]) if "outer" in name)
    means = [sum(v[i][0] for v in coefficients["values"].values()) for i in range(len(coefficients["adapters"]))]
    assert max(means) == means[place]

    told = ok("eval")
    assert "outer.test.jsonl (lora.toml); baseline base" in told.err
    assert f"eval: {folder.name} changed the output on" in told.err
    rows = {line.split("\t")[0]: line.split("\t") for line in told.out.splitlines()}
    assert [name for name in rows if name.startswith("merge-ties")]
    assert float(rows[folder.name][1]) > 0.8
    assert float(rows["base"][1]) < 0.2
    again = ok("fit", "--data", "task.jsonl")
    assert again.out == fitted.out
    assert "up to date" in again.err


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_the_merged_adapter_is_what_the_fit_measured_and_peft_loads_it(here: World) -> None:
    folder = ok("fit", *QUICK).out.strip()
    results = record(folder)["results"]
    assert results["loss_merged"] == pytest.approx(results["loss"], rel=1e-3)
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from lora_cli.models.ref import load
    from lora_cli.steps.evaluate.evaluate import Updates
    from tests.tiny_bases import opened

    base = load(str(here.base))
    tokens = torch.tensor([[1, 20, 30, 40, 50]])
    with torch.no_grad(), base.applied(Updates(opened(Path(folder)))):
        ours = base.model(input_ids=tokens).logits
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(here.base), folder)
    with torch.no_grad():
        assert torch.allclose(theirs(input_ids=tokens).logits, ours, atol=1e-4)
    written = readers.peft(Path(folder))
    for read in readers.READERS.values():
        close(read(Path(folder), written), written, 1e-6)


def test_controls_are_reported_and_gain_is_claimed_only_where_it_is_measured(here: World) -> None:
    told = ok("fit", *QUICK, "--control", "random", "--json")
    document = json.loads(told.out)
    assert document["schema"] == "lora.fit/1"
    results = document["results"]
    [base, control] = results["comparisons"]
    assert (base["against"], control["against"]) == ("base", "random")
    assert control["loss"] > results["loss"]
    assert base["difference"]["delta"] == pytest.approx(results["loss"] - base["loss"], abs=1e-9)
    assert f"gain over the base, whose loss is {base['loss']:.3f}: " in told.err
    assert f"gain over the random-LoRA control, whose loss is {control['loss']:.3f}: " in told.err


@pytest.mark.parametrize(
    ("low", "high", "p", "claim"),
    [
        (-0.3, -0.1, 0.01, "gain over {}: 0.200 [0.100, 0.300], separable from zero"),
        (-0.3, -0.1, 0.5, "no measurable gain over {}: 0.200 [0.100, 0.300], not separable from zero"),
        (-0.3, 0.1, 0.2, "no measurable gain over {}: 0.200 [-0.100, 0.300], not separable from zero"),
        (-0.2, 0.0, 0.04, "no measurable gain over {}: 0.200 [0.000, 0.200], not separable from zero"),
        (0.1, 0.3, 0.01, "worse than {}: by 0.200 [0.100, 0.300]"),
        (0.1, 0.3, 0.5, "no measurable gain over {}: -0.200 [-0.300, -0.100], not separable from zero"),
    ],
)
def test_no_gain_is_claimed_that_interval_and_p_do_not_support(low: float, high: float, p: float, claim: str) -> None:
    from lora_cli.commands.fit import outcome
    from lora_cli.scores import Difference
    from lora_cli.steps.fit.controls import Comparison

    found = Difference(delta=-0.2 if low < 0 else 0.2, low=low, high=high, p=p)
    learnt = SimpleNamespace(loss_after=0.874, speed=1234.5)
    trial = SimpleNamespace(
        result=SimpleNamespace(measure="loss", kept="best at step 90", learnt=learnt, judged=None, n_validation=20),
        comparisons=[
            Comparison(against=name, loss=loss, difference=found)
            for name, loss in (("base", 1.212), ("random", 0.881), ("target", 0.802))
        ],
    )
    others = ("the base, whose loss is 1.212", "the random-LoRA control, whose loss is 0.881")
    assert outcome(SimpleNamespace(trials=[trial], loss_merged=0.874)) == [
        "fit: validation loss 1.212 → 0.874 · best at step 90, 20 validation examples · 1,234 tokens/s",
        *("  " + claim.format(other) for other in (*others, "the target LoRA, whose loss is 0.802")),
    ]


def test_few_examples_are_said_to_show_nothing(here: World) -> None:
    Path("two.jsonl").write_text("".join(Path("task.jsonl").read_text().splitlines(keepends=True)[:2]))
    told = ok("fit", "--data", "two.jsonl", "--steps", "1")
    few = "cannot show a difference"
    assert f"1 validation example {few}, even if all of them were better; 6 could" in told.err
    asked = ok("eval", "pool/tarn/mirror", "pool/mossy/double", "--data", "two.jsonl", "--metric", "nll")
    assert f"note: 2 examples {few} among 2 comparisons, even if all of them were better; 7 could" in asked.err


def test_a_target_adapter_joins_and_the_options_are_recorded(here: World) -> None:
    trained = ok("train", "--rank", "4", "--steps", "20", "--lr", "5e-3", "-o", "mine")
    assert trained.out == "mine\n"
    assert "rank 4" in trained.err
    assert json.loads(Path("mine/adapter_config.json").read_text())["base_model_name_or_path"] == here.base_name
    assert str(here.folder) not in Path("mine/README.md").read_text() + Path("mine/run.json").read_text()
    options = (
        "--target",
        "mine",
        "--granularity",
        "layer",
        "--activation",
        "linear",
        "--init",
        "average",
        "--l1",
        "0.01",
    )
    folder = Path(ok("fit", "pool/tarn/mirror", *QUICK, *options, "-o", "joined").out.strip())
    settings = record(folder)["settings"]
    assert (settings["granularity"], settings["activation"], settings["init"], settings["l1"]) == (
        "layer", "linear", "average", 0.01,
    )  # fmt: skip
    coefficients = json.loads((folder / "coefficients.json").read_text())
    assert coefficients["adapters"][0] == settings["target"]
    assert settings["target"].startswith(f"{here.folder.name}/mine@")
    again = ok("train", "--rank", "4", "--steps", "20", "--lr", "5e-3", "-o", "mine", "--json")
    assert "up to date" in again.err
    assert json.loads(again.out) == {**record("mine"), "schema": "lora.train/1", "out": "mine"}


def test_a_fit_and_an_evaluation_draw_beside_their_results(here: World) -> None:
    told = ok("fit", *QUICK, "--control", "random", "--plot", "fit.svg", "-o", "drawn")
    assert "plot: fit.svg" in told.err
    first = Path("fit.svg").read_bytes()
    assert b"random-LoRA control: " in first
    again = ok("fit", *QUICK, "--control", "random", "--plot", "fit.svg", "-o", "drawn")
    assert "up to date" in again.err
    assert Path("fit.svg").read_bytes() == first
    shown = json.loads(ok("eval", "drawn", "--plot", "eval.svg", "--json").out)
    assert shown["plot"] == "eval.svg"
    assert b"baseline: base" in Path("eval.svg").read_bytes()


def test_equal_work_gives_equal_bytes(here: World) -> None:
    for name in ("one", "two"):
        ok("fit", *QUICK, "-o", name)
    files = sorted(file.name for file in Path("one").iterdir())
    assert [Path("one", file).read_bytes() == Path("two", file).read_bytes() for file in files] == [True] * len(files)


def test_dry_run_prints_the_plan_and_changes_nothing(here: World) -> None:
    plan = json.loads(ok("fit", "--dry-run", "--json").out)
    assert plan["adapters"] == 4
    assert json.loads(ok("train", "--dry-run", "--json").out)["rank"] == 64
    assert not Path("lora-runs").exists()


def test_eval_without_test_data_takes_the_validation_part_of_the_last_fit(here: World) -> None:
    settings = Path("lora.toml")
    settings.write_text("\n".join(line for line in settings.read_text().splitlines() if not line.startswith("test")))
    assert "no test data" in refused(2, "eval", "pool/kestrel/outer")
    ok("fit", *QUICK)
    told = ok("eval", "--json")
    assert "20 examples of task.jsonl (the validation part of the last fit)" in told.err
    assert {row["n"] for row in json.loads(told.out)["rows"]} == {20}
    Path("task.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    assert "has changed" in refused(1, "eval")


def test_eval_scores_named_adapters_and_keeps_rows_and_scores(here: World) -> None:
    told = ok("eval", "pool/kestrel/outer", "pool/tarn/mirror", "--json", "-o", "rows.jsonl")
    document = json.loads(told.out)
    scores = {row["system"]: row for row in document["rows"]}
    assert list(scores) == ["base", "pool/kestrel/outer", "pool/tarn/mirror"]
    best = scores["pool/kestrel/outer"]
    assert best["value"] > 0.8
    assert best["delta_low"] > 0.5
    assert best["p"] < 1e-6
    assert len(Path("rows.jsonl").read_text().splitlines()) == 300
    shown = json.loads(ok("runs", "list", "--json").out)["rows"]
    assert shown[0]["command"] == "eval"
    detail = json.loads(ok("runs", "show", shown[0]["id"], "--json").out)
    assert {score["system"] for score in detail["scores"]} == set(scores)
    assert ok("eval", "pool/kestrel/outer", "--metric", "nll", "-q").out == "base\npool/kestrel/outer\n"


def test_an_adapter_without_effect_fails_the_evaluation(here: World) -> None:
    folder = shutil.copytree(here.pool / "kestrel" / "outer", "idle")
    weights = Path(folder, "adapter_model.safetensors")
    tensors = {name: tensor * ("lora_A" in name) for name, tensor in load_file(weights).items()}
    save_file(tensors, weights)
    code, out, err = lora("eval", "pool/tarn/mirror", "idle")
    assert code == 5
    assert "no effect of idle: all outputs and likelihoods equal those of the base, on 100 prompts" in err
    assert [line.split("\t")[0] for line in out.splitlines()] == ["base", "pool/tarn/mirror", "idle"]
    allowed = ok("eval", "pool/tarn/mirror", "idle", "--allow-no-effect")
    assert "warning: no effect of idle: all outputs and likelihoods equal those of the base" in allowed.err
    assert [line.split("\t")[:2] for line in allowed.out.splitlines()] == [
        line.split("\t")[:2] for line in out.splitlines()
    ]


def test_an_adapter_that_only_moves_likelihoods_is_a_warning(here: World) -> None:
    folder = shutil.copytree(here.pool / "kestrel" / "outer", "faint")
    weights = Path(folder, "adapter_model.safetensors")
    save_file(
        {name: tensor * (1e-3 if "lora_B" in name else 1) for name, tensor in load_file(weights).items()}, weights
    )
    told = ok("eval", "faint")
    assert "faint\t" in told.out
    assert "warning: faint changes likelihoods slightly but not a single output" in told.err


def test_a_record_that_does_not_name_its_data(here: World) -> None:
    settings = Path("lora.toml")
    settings.write_text("\n".join(line for line in settings.read_text().splitlines() if not line.startswith("test")))
    folder = Path(ok("fit", "pool/kestrel/outer", *QUICK).out.strip())
    written = record(folder)
    del written["settings"]["data"]
    (folder / "run.json").write_text(json.dumps(written))
    assert "names no data that was learnt" in refused(1, "eval")


def test_bad_input_is_answered_in_a_line(here: World) -> None:
    bad = Path("bad.jsonl")
    bad.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"\n')
    assert "bad.jsonl:2: malformed JSON" in refused(1, "fit", "--data", "bad.jsonl")
    assert "bad.jsonl:2" in refused(1, "eval", "pool/kestrel/outer", "--data", "bad.jsonl")
    assert "no such file" in refused(1, "train", "--data", "absent.jsonl")
    assert "'neuron' is not one of 'adapter'" in refused(2, "fit", "--granularity", "neuron")
    assert "unknown control 'magic'" in refused(2, "fit", "--control", "magic")
    assert "without =WEIGHT" in refused(2, "fit", "pool/kestrel/outer=2")
    assert "no system 'nothing'" in refused(3, "eval", "pool/kestrel/outer", "--baseline", "nothing")
    assert "none written yet" in refused(3, "eval")
    Path("taken").mkdir()
    assert "taken exists" in refused(1, "fit", "-o", "taken")
    assert "given twice" in refused(5, "fit", "pool/kestrel/outer", "pool/kestrel/outer")
    assert "has no modules" in (told := refused(5, "train", "--target-modules", "c_attn")) or "c_attn" in told


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (2, ("fit", "--l1", "-1")),
        (2, ("fit", "--l1", "nan")),
        (2, ("fit", "--control", "magic")),
        (2, ("train", "--rank", "0")),
        (2, ("eval", "pool/kestrel/outer", "--metric", "bleu")),
        (3, ("eval", "pool/kestrel/outer", "--baseline", "nothing")),
        (2, ("fit", "--device", "cpu:foo")),
        (5, ("train", "--device", "cuda:99")),
        (5, ("eval", "pool/kestrel/outer", "--device", "cuda:99")),
    ],
)
def test_what_is_wrong_from_the_start_is_said_before_anything_is_recorded_or_loaded(
    here: World, monkeypatch: pytest.MonkeyPatch, code: int, words: tuple[str, ...]
) -> None:
    monkeypatch.setattr("lora_cli.models.ref.BaseRef.load", None)
    refused(code, *words)
    assert json.loads(ok("runs", "list", "--json").out)["rows"] == []


def test_a_base_is_needed(here: World, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("lora.toml").unlink()
    for command in ("fit", "train", "eval"):
        told = refused(2, command, "--data", "task.jsonl")
        assert "no base model" in told
        assert "LORA_BASE" in told


@pytest.mark.slow
@needs_stories
def test_train_merge_fit_and_eval_on_a_real_base(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["Lily", "Tom", "Anna", "Ben", "Mia", "Max", "Sue", "Tim"]
    things = ["ball", "dog", "tree", "boat", "hat", "cake"]

    def write(file: str, ending: str, n: int, shift: int) -> None:
        rows = [
            {"prompt": f"{names[(i + shift) % 8]} had a {things[i % 6]}.", "completion": f"It was {ending}."}
            for i in range(n)
        ]
        Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))

    monkeypatch.setenv("LORA_BASE", str(STORIES))
    for name, ending in (("big", "so big"), ("sad", "so sad")):
        write(f"{name}.jsonl", ending, 40, 0)
        options = ("--rank", "4", "--alpha", "8", "--dropout", "0", "--steps", "40", "--lr", "1e-2", "-o", name)
        ok("train", "--data", f"{name}.jsonl", *options)
    write("new.jsonl", "so sad", 30, 3)
    write("test.jsonl", "so sad", 24, 5)
    ok("merge", "./big", "./sad", "-o", "average")
    ok("fit", "./big", "./sad", "--data", "new.jsonl", "--steps", "40", "-o", "fitted")
    # This model has no use for its end token, so it is stopped after the seven tokens of the answer.
    told = ok("eval", "./big", "./average", "./fitted", "--data", "test.jsonl", "--max-new-tokens", "7", "--json")
    scores = {row["system"]: row for row in json.loads(told.out)["rows"]}
    assert scores["base"]["value"] == scores["./big"]["value"] == 0
    assert scores["./fitted"]["value"] > 0.8
    assert scores["./fitted"]["log_likelihood"] >= scores["./average"]["log_likelihood"] - 0.05
    assert {scores[name]["changed"] for name in ("./big", "./average", "./fitted")} == {24}


@pytest.mark.slow
def test_a_policy_on_licences_refuses_before_a_fit_or_a_bake_begins(here: World) -> None:
    [first, *_] = sorted(path for path in Path("pool").rglob("adapter_config.json"))
    folder = first.parent
    (folder / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\nA card.\n")
    ok("pool", "sync")
    strict = ("--license-policy", "commercial", "-o", "x")
    fit = refused(5, "fit", "--data", "task.jsonl", str(folder), *QUICK, *strict)
    bake = refused(5, "bake", str(folder), *strict)
    assert "cc-by-nc-4.0 (non-commercial)" in fit
    assert "cc-by-nc-4.0 (non-commercial)" in bake
    assert not Path("x").exists()
    told = ok("bake", str(folder), "--license-policy", "warn", "-o", "baked")
    assert "cc-by-nc-4.0 (non-commercial)" in told.err


@pytest.mark.slow
def test_in_a_copy_the_last_run_is_the_copys_own(here: World, monkeypatch: pytest.MonkeyPatch) -> None:
    ok("merge", "-m", "linear", "-o", "merged")
    copy = here.folder.with_name("copy")
    shutil.copytree(here.folder, copy)
    shutil.rmtree(here.folder / "merged")
    monkeypatch.chdir(copy)
    told = ok("eval", "--data", "task.jsonl", "--metric", "nll", "--json")
    assert [row["system"] for row in json.loads(told.out)["rows"]] == ["base", "merged"]
    assert not (here.folder / "merged").exists()
