"""Adapters of another class than their base's: classifiers on a model without a head, embeddings of one with a head."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel
from torch import Tensor

from tests.architectures import config
from tests.cli import ok, refused

pytestmark = pytest.mark.filterwarnings("ignore")

# Kind of base, the class that it names, the class of the adapters, what PEFT is told.
CLASSES = [
    ("vit", "ViTModel", "ViTForImageClassification", {"target_modules": ["q_proj", "v_proj"]}),
    ("vit", "ViTModel", "ViTForImageClassification", {"target_modules": ["fc1"], "modules_to_save": ["classifier"]}),
    ("bert", "BertModel", "BertForSequenceClassification", {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    ("roberta", "RobertaModel", "RobertaForTokenClassification", {"target_modules": ["key"], "task_type": "TOKEN_CLS"}),
    ("llama", "LlamaForCausalLM", "LlamaModel", {"target_modules": ["q_proj"], "task_type": "FEATURE_EXTRACTION"}),
    ("llama", "LlamaForCausalLM", "LlamaModel", {"target_modules": ["layers.1.self_attn.q_proj"]}),
    ("llama", "LlamaModel", "LlamaForSequenceClassification", {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"}),
    ("qwen3_moe", "Qwen3MoeForCausalLM", "Qwen3MoeModel", {"target_parameters": ["gate.weight", "experts.down_proj"]}),
]  # fmt: skip


def base_named(kind: str, architecture: str) -> str:
    """A folder with a configuration that names this class."""
    made = config(kind)
    made.save_pretrained("base")
    file = Path("base/config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": [architecture]}))
    return str(Path("base").resolve())


def net(kind: str, name: str) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, name)(config(kind))


def trained_on(folder: str, kind: str, name: str, *, seed: int, **settings: Any) -> None:
    """An adapter as PEFT saves it of this class, with random factors and head."""
    wrapped = peft.get_peft_model(net(kind, name), LoraConfig(**{"r": 2 + seed, "lora_alpha": 6} | settings))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    wrapped.save_pretrained(folder)
    file = Path(folder) / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(Path("base").resolve())}))


def by_peft(folder: str, kind: str, name: str) -> dict[str, Tensor]:
    """What PEFT adds to each weight of the model without its head."""
    before = {name: weight.clone() for name, weight in net(kind, name).named_parameters()}
    merged = PeftModel.from_pretrained(net(kind, name), folder).merge_and_unload()
    changed = {name: weight - before[name] for name, weight in merged.named_parameters()}
    return {
        name: one for name, one in changed.items() if one.abs().max() > 0 and not name.startswith(("classif", "score"))
    }


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "named", "trained", "settings"), CLASSES)
def test_the_result_is_for_the_class_that_its_parents_were_trained_on(
    kind: str, named: str, trained: str, settings: dict[str, Any]
) -> None:
    base = base_named(kind, named)
    for seed, folder in enumerate("ab"):
        trained_on(folder, kind, trained, seed=seed, **settings)
    head = ["--saved-modules", "a"] if {"modules_to_save", "task_type"} & settings.keys() and "For" in trained else []
    words = ["--base", base, "-m", "linear", "--weights", "sum", "--rank", "sum", *head]
    told = ok("merge", "a", "b", *words, "-o", "out")
    assert "a: names of another class: " in told.err
    one, other, both = (by_peft(folder, kind, trained) for folder in ("a", "b", "out"))
    assert both.keys() == one.keys() | other.keys()
    for name, delta in both.items():
        torch.testing.assert_close(delta, one[name] + other[name], rtol=1e-5, atol=1e-6)
    again = ok(
        "merge", "out", *words[:-2] if head else words, *(["--saved-modules", "out"] if head else []), "-o", "twice"
    )
    assert "out: names of another class: " in again.err
    assert by_peft("twice", kind, trained).keys() == both.keys()


def test_parents_of_several_classes_are_merged_under_the_names_of_the_base() -> None:
    base = base_named("llama", "LlamaForCausalLM")
    trained_on("a", "llama", "LlamaModel", seed=0, target_modules=["q_proj"])
    trained_on("b", "llama", "LlamaForCausalLM", seed=1, target_modules=["q_proj"])
    ok("merge", "a", "b", "--base", base, "-o", "out")
    assert by_peft("out", "llama", "LlamaForCausalLM").keys() == by_peft("b", "llama", "LlamaForCausalLM").keys()
    assert "auto_mapping" not in json.loads(Path("out/adapter_config.json").read_text())


def test_a_classifier_that_its_base_has_no_room_for_is_told_of_its_class() -> None:
    base = base_named("bert", "BertForMaskedLM")
    trained_on("a", "bert", "BertForSequenceClassification", seed=0, target_modules=["dense"], task_type="SEQ_CLS")
    told = refused(5, "merge", "a", "--base", base, "--saved-modules", "drop", "-o", "out")
    assert "does not fit BertForMaskedLM: not in the base: 1 of 7 modules (such as bert.pooler.dense)" in told
    assert "it was trained for SEQ_CLS: give a --base whose config.json names the class for that" in told
