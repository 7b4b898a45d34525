"""Heads and other modules saved whole beside an update: refused, dropped, or taken from one parent."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor

from tests.architectures import model, trained
from tests.cli import ok, refused

pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.arange(3, 12)[None]


@pytest.fixture
def parents() -> Path:
    """Two classifiers on one BERT, a and b, whose heads differ, and c, an update alone; returns the base's folder."""
    base = Path("base")
    model("bert").save_pretrained(base)
    for seed, name in enumerate("abc"):
        head = {"modules_to_save": ["classifier"], "task_type": "SEQ_CLS"} if name != "c" else {}
        trained(Path(name), "bert", LoraConfig(r=2 + seed, target_modules=["query"], **head), seed=seed)
    return base.resolve()


def logits(folder: str) -> Tensor:
    with torch.no_grad():
        return PeftModel.from_pretrained(model("bert"), folder).eval()(input_ids=IDS).logits


def test_a_head_is_refused_unless_it_is_spoken_for(parents: Path) -> None:
    message = refused(5, "merge", "a", "c", "--base", str(parents), "-o", "out")
    assert "a: tensors of a full head saved (classifier.weight)" in message
    assert "--saved-modules drop" in message
    assert not Path("out").exists()


def test_a_dropped_head_leaves_the_update_alone(parents: Path) -> None:
    told = ok("merge", "a", "b", "--base", str(parents), "-m", "linear", "--saved-modules", "drop", "-o", "out")
    assert "dropped modules saved whole: classifier of" in told.err
    assert all("lora_" in name for name in load_file("out/adapter_model.safetensors"))
    written = json.loads(Path("out/adapter_config.json").read_text())
    assert (written["modules_to_save"], written["task_type"]) == (None, None)
    PeftModel.from_pretrained(model("bert"), "out")


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_a_module_saved_whole_has_no_update_beside_it(module: str) -> None:
    model("llama").save_pretrained("base")
    trained(Path("a"), "llama", LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[module]))
    trained(Path("b"), "llama", LoraConfig(r=2, target_modules=["q_proj", module]))
    words = ["merge", "a", "b", "--base", str(Path("base").resolve()), "-o", "out"]
    told = refused(5, *words, "--saved-modules", "a")
    assert f"{module} is saved whole in" in told
    assert "/b: PEFT applies only one" in told
    ok(*words, "--saved-modules", "a", "--scope", "modules=q_proj")


@pytest.mark.parametrize("words", [(), ("--compact",)])
def test_the_head_of_one_parent_is_loaded_by_peft_as_it_was(parents: Path, words: tuple[str, ...]) -> None:
    told = ok(
        "merge", "a=1", "b=1", "c=1", "--base", str(parents), "-m", "linear", "--rank", "sum", "--saved-modules", "b",
        "-o", "out", *words,
    )  # fmt: skip
    assert "kept modules saved whole: classifier of" in told.err
    assert "dropped modules saved whole: classifier of" in told.err
    written = json.loads(Path("out/adapter_config.json").read_text())
    assert (written["modules_to_save"], written["task_type"]) == (["classifier", "score"], "SEQ_CLS")
    theirs = load_file("b/adapter_model.safetensors")
    ours = load_file("out/adapter_model.safetensors")
    heads = [name for name in theirs if "classifier" in name]
    assert len(heads) == 2
    assert all(torch.equal(ours[name], theirs[name]) for name in heads)
    base = model("bert")
    by_hand = {name: weight.clone() for name, weight in base.state_dict().items()}
    for folder in "abc":
        merged = PeftModel.from_pretrained(model("bert"), folder).merge_and_unload().state_dict()
        for name, weight in by_hand.items():
            if "query" in name:
                weight += merged[name] - base.state_dict()[name]
    for name in heads:
        by_hand[name.removeprefix("base_model.model.")] = theirs[name]
    expected = model("bert")
    expected.load_state_dict(by_hand)
    with torch.no_grad():
        torch.testing.assert_close(logits("out"), expected(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_taken_is_said(parents: Path) -> None:
    base = str(parents)
    take = ["merge", "a", "c", "--base", base, "-o", "out", "--saved-modules"]
    assert "refuse, drop or one of the adapters, not 'z'" in refused(2, *take, "z")
    assert "c holds no modules saved whole" in refused(5, *take, "c")
    assert "--dense cannot keep modules saved whole" in refused(2, *take, "a", "--dense")
    settings = json.loads(Path("a/adapter_config.json").read_text())
    Path("a/adapter_config.json").write_text(json.dumps({**settings, "modules_to_save": None, "task_type": None}))
    assert "modules_to_save names none of the modules saved whole, so PEFT loads none" in refused(5, *take, "a")


def test_updates_are_compared_whatever_is_beside_them(parents: Path) -> None:
    base = str(parents)
    assert "cosine" in ok("diff", "a", "b", "--base", base).err
    assert ok("pool", "similarity", "a", "b", "c", "--base", base).code == 0
    ok("pool", "sync", base, "--from", ".")
    rows = {row["id"]: row for line in ok("pool", "list", "--jsonl").out.splitlines() if (row := json.loads(line))}
    [head] = [row for name, row in rows.items() if name.endswith("/a")]
    assert (head["status"], head["rank"]) == ("unusable", 2)
    assert head["norm"] > 0
    ok("merge", head["id"], "--base", base, "--saved-modules", "drop", "-o", "catalogued")
    assert "--saved-modules drop" in refused(5, "merge", head["id"], "--base", base, "-o", "none")


def test_a_locked_merge_takes_the_same_head(parents: Path) -> None:
    ok("merge", "a", "b", "--base", str(parents), "--saved-modules", "a", "-o", "out")
    ok("merge", "--locked", "out/run.json", "--base", str(parents), "-o", "again")
    name = "adapter_model.safetensors"
    assert Path("again", name).read_bytes() == Path("out", name).read_bytes()


def test_a_head_is_no_part_of_what_bake_adds_up(parents: Path) -> None:
    assert "tensors of a full head saved" in refused(5, "bake", "a", "--base", str(parents), "-o", "baked")
