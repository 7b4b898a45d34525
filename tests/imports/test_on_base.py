"""(IA)³ and OFT of PEFT as the best LoRA of a rank: beside PEFT's own merge in float64, on whole models."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.cli import ok, refused
from tests.imports.test_imports import dense
from tests.tiny_bases import saved, tiny_gpt2, tiny_llama

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Invalid .oft_block_size.:UserWarning"),
]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


def qwen2() -> Any:
    """A tiny Qwen 2, whose q, k and v have a bias."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    return Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2))


def adapted(model: Any, kind: str, folder: Path, **settings: Any) -> dict[str, Tensor]:
    """Save the model as the folder base and an adapter of PEFT in `folder`; the updates of PEFT's merge in float64."""
    model.save_pretrained("base", max_shard_size="20KB")
    before = {name: tensor.double().clone() for name, tensor in model.state_dict().items()}
    made = peft.get_peft_model(model, getattr(peft, f"{kind}Config")(**settings))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 8)
    made.save_pretrained(folder)
    after = made.double().merge_and_unload().state_dict()
    turned = settings.get("fan_in_fan_out", False)
    changes = {name: after[name] - tensor for name, tensor in before.items()}
    return {
        name.removesuffix(".weight"): change.T if turned else change
        for name, change in changes.items()
        if change.any() and name != "lm_head.weight"
    }


def error(found: Tensor, wanted: Tensor) -> float:
    return float(torch.linalg.norm(found - wanted) / torch.linalg.norm(wanted))


def told() -> Any:
    return json.loads(Path("out/run.json").read_text())["results"]


def demand_right(updates: dict[str, Tensor], rank: int) -> None:
    """Of a low rank the error told is that of the result, and the smallest; the full rank is the update itself."""
    ok("convert", "mine", "--base", "base", "--rank", str(rank), "-o", "out")
    found, total, lost = dense(Path("out")), 0.0, 0.0
    assert found.keys() == updates.keys() != set()
    for module, update in updates.items():
        values = torch.linalg.svdvals(update)
        best = float(values[rank:].norm() / values.norm())
        assert error(found[module], update) == pytest.approx(best, rel=1e-3, abs=1e-6), module
        assert told()["modules"][module]["error"] == pytest.approx(error(found[module], update), rel=1e-5, abs=1e-6)
        total, lost = total + float(values.square().sum()), lost + float((found[module] - update).square().sum())
    assert told()["error"] == pytest.approx((lost / total) ** 0.5, rel=1e-5, abs=1e-6)
    ok("convert", "mine", "--base", "base", "--rank", "512", "-o", "full")
    full = dense(Path("full"))
    assert max(error(full[module], update) for module, update in updates.items()) <= 1e-6


IA3S: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "both sides": (tiny_llama, {"target_modules": [*ATTENTION, *MLP], "feedforward_modules": ["down_proj", "o_proj"]}),
    "an expression": (tiny_llama, {"target_modules": MLP, "feedforward_modules": r".*layers\.0\..*down_proj"}),
    "PEFT's choice": (tiny_llama, {}),
    "Conv1D": (
        tiny_gpt2,
        {
            "target_modules": ["mlp.c_proj", "c_fc"],
            "feedforward_modules": ["mlp.c_proj", "c_fc"],
            "fan_in_fan_out": True,
        },
    ),
    "a layer with a bias, its inputs": (qwen2, {"target_modules": ["q_proj"], "feedforward_modules": ["q_proj"]}),
}


@pytest.mark.parametrize("name", IA3S)
def test_ia3_is_what_peft_merges(name: str) -> None:
    model, settings = IA3S[name]
    demand_right(adapted(model(), "IA3", Path("mine"), task_type="CAUSAL_LM", **settings), 5)


OFTS: dict[str, dict[str, Any]] = {
    "blocks": {"oft_block_size": 8},
    "a number of blocks": {"oft_block_size": 0, "r": 2},
    "blocks that PEFT adjusts": {"oft_block_size": 7},
    "one block for all": {"oft_block_size": 8, "block_share": True},
    "the Cayley transform": {"oft_block_size": 8, "use_cayley_neumann": False},
    "COFT": {"oft_block_size": 8, "coft": True, "eps": 0.5},
    **{f"{n} terms": {"oft_block_size": 16, "num_cayley_neumann_terms": n} for n in (2, 3, 4, 6)},
}


@pytest.mark.parametrize("name", OFTS)
def test_oft_is_what_peft_merges(name: str) -> None:
    settings = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM", **OFTS[name]}
    demand_right(adapted(tiny_llama(), "OFT", Path("mine"), **settings), 5)


def test_the_lora_has_the_logits_of_the_adapter() -> None:
    adapted(
        tiny_llama(), "IA3", Path("mine"), target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]
    )
    ok("convert", "mine", "--base", "base", "--rank", "64", "-o", "out")
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        found = [
            peft.PeftModel.from_pretrained(tiny_llama().from_pretrained("base"), name).eval()(ids).logits
            for name in ("mine", "out")
        ]
    assert error(found[1], found[0]) <= 1e-5


def test_a_bias_that_is_multiplied_too_is_refused_by_name() -> None:
    adapted(qwen2(), "IA3", Path("mine"), target_modules=["o_proj", "v_proj"], feedforward_modules=[])
    said = refused(5, "convert", "mine", "--base", "base", "--rank", "4", "-o", "out")
    assert "model.layers.0.self_attn.v_proj has a bias in the base" in said
    assert not Path("out").exists()


def test_without_base_or_rank_the_remedy_names_them() -> None:
    adapted(tiny_llama(), "OFT", Path("mine"), target_modules=["q_proj"], oft_block_size=8)
    for words in (["convert", "mine"], ["convert", "mine", "--rank", "4"], ["convert", "mine", "--base", "base"]):
        assert "--base BASE --rank R" in refused(5, *words, "-o", "out")
    for words in (["merge", "mine", "-o", "out"], ["bake", "mine", "--base", "base", "-o", "out"]):
        assert "--base BASE --rank R" in refused(5, *words)


def test_another_base_is_refused_by_name() -> None:
    adapted(tiny_llama(), "IA3", Path("mine"), target_modules=["v_proj"], feedforward_modules=[])
    saved(Path("wide"), hidden_size=64)
    said = refused(5, "convert", "mine", "--base", "wide", "--rank", "4", "-o", "out")
    assert "v_proj does not fit a layer of" in said
    saved(Path("short"), num_hidden_layers=1)
    said = refused(5, "convert", "mine", "--base", "short", "--rank", "4", "-o", "out")
    assert "model.layers.1.self_attn.v_proj is no linear layer of short" in said
    assert "no base model at" in refused(3, "convert", "mine", "--base", "./none", "--rank", "4", "-o", "out")


def test_a_module_that_is_not_changed_gets_zeros_and_an_adapter_of_none_is_refused() -> None:
    adapted(tiny_llama(), "IA3", Path("mine"), target_modules=["v_proj", "k_proj"], feedforward_modules=[])
    file = Path("mine/adapter_model.safetensors")
    tensors = load_file(file)
    save_file({name: torch.ones_like(one) if "k_proj" in name else one for name, one in tensors.items()}, file)
    ok("convert", "mine", "--base", "base", "--rank", "3", "-o", "out")
    assert {module for module, update in dense(Path("out")).items() if not update.any()} == {
        f"model.layers.{layer}.self_attn.k_proj" for layer in range(2)
    }
    save_file({name: torch.ones_like(one) for name, one in tensors.items()}, file)
    assert "changes nothing" in refused(5, "convert", "mine", "--base", "base", "--rank", "3", "-o", "other")


def test_a_broken_base_leaves_nothing() -> None:
    adapted(tiny_llama(), "IA3", Path("mine"), target_modules=["v_proj"], feedforward_modules=[])
    tiny_llama().save_pretrained("base2")
    file = Path("base2/model.safetensors")
    tensors = load_file(file)
    tensors["model.layers.1.self_attn.v_proj.weight"][0, 0] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    said = refused(5, "convert", "mine", "--base", "base2", "--rank", "4", "-o", "out")
    assert "NaN or Inf in model.layers.1.self_attn.v_proj of base2" in said
    assert not Path("out").exists()


def test_the_base_is_an_input_and_never_the_output() -> None:
    adapted(tiny_llama(), "IA3", Path("mine"), target_modules=["v_proj"], feedforward_modules=[])
    words = ["convert", "mine", "--rank", "4", "-o", "out", "--base"]
    ok(*words, "base")
    [named] = [one for one in json.loads(Path("out/run.json").read_text())["inputs"] if one.startswith("base:")]
    assert "up to date" in ok(*words, "base").err
    with Path("base/config.json").open("a") as file:
        file.write("\n")
    assert "up to date" not in ok(*words, "base", "--force").err
    assert named not in json.loads(Path("out/run.json").read_text())["inputs"]
    assert "that is where the base is" in refused(1, *words[:4], "--base", "base", "-o", "base", "--force")


def test_an_oft_from_before_the_series_changed_is_told() -> None:
    updates = adapted(tiny_llama(), "OFT", Path("mine"), target_modules=["q_proj"], oft_block_size=8)
    file = Path("mine/adapter_config.json")
    config = json.loads(file.read_text())
    assert "PEFT 0.18" not in ok("convert", "mine", "--base", "base", "--rank", "64", "-o", "new").err
    del config["peft_version"]
    file.write_text(json.dumps(config))
    assert "saved before PEFT 0.18" in ok("convert", "mine", "--base", "base", "--rank", "64", "-o", "out").err
    assert all(error(found, updates[module]) <= 1e-6 for module, found in dense(Path("out")).items())
    file.write_text(json.dumps(config | {"num_cayley_neumann_terms": 10**9}))
    assert "not from 0 to 1000" in refused(5, "convert", "mine", "--base", "base", "--rank", "4", "-o", "other")
