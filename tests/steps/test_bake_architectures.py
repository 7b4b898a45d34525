"""`lora bake` on every architecture: the result, loaded by transformers, is what PEFT makes of the same adapter."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel

from lora_cli.formats.skeleton import Stored
from lora_cli.models import skeleton as skeletons
from tests.architectures import SPECS, factors, model, saved_adapter, skeleton, trained
from tests.cli import ok, refused

pytestmark = pytest.mark.filterwarnings("ignore")


# Embeddings that a class computes and leaves out of its checkpoints.
_COMPUTED = {"marian": ".embed_positions"}


def saved_base(folder: Path, kind: str) -> Path:
    """The base as transformers saves it, under the names of its published checkpoints."""
    model(kind).save_pretrained(folder)
    return folder


def loaded(folder: Path, kind: str) -> Any:
    return getattr(transformers, SPECS[kind][0]).from_pretrained(folder)


def merged_by_peft(base: Path, kind: str, adapter: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(loaded(base, kind), str(adapter)).merge_and_unload()


def bakes_as_peft(kind: str, adapter: Path) -> None:
    base = saved_base(Path("base"), kind)
    ok("bake", str(adapter), "--base", str(base), "-o", "out")
    ours, theirs, before = loaded(Path("out"), kind), merged_by_peft(base, kind, adapter), loaded(base, kind)
    start, expected = dict(before.named_parameters()), dict(theirs.named_parameters())
    moved = 0
    for name, weight in ours.named_parameters():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6, msg=name)
        moved += not torch.equal(weight, start[name])
    assert moved > 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", SPECS)
def test_layers_of_every_architecture_bake_as_peft_applies_them(kind: str, tmp_path: Path) -> None:
    base = skeleton(kind)
    targets = [
        name
        for name, matrix in base.matrices.items()
        if matrix.kind in ("linear", "conv", "embedding")
        and name not in base.ties
        and not name.endswith(_COMPUTED.get(kind, "/"))
        and name.rpartition(".")[2] not in (base.retargeted or {"out_proj", "conv1d"})
    ]
    bakes_as_peft(kind, trained(tmp_path / "adapter", kind, LoraConfig(r=2, lora_alpha=6, target_modules=targets)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "phimoe", "gpt_oss", "llama4_text", "qwen3_vl_moe"])
def test_fused_experts_and_routers_bake_as_peft_applies_them(kind: str, tmp_path: Path) -> None:
    router = next(name for name in skeleton(kind).matrices if name.endswith((".gate", ".router")))
    parameters = ["gate_up_proj", "down_proj", f"{router.rpartition('.')[2]}.weight"]
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"], target_parameters=parameters)
    bakes_as_peft(kind, trained(tmp_path / "adapter", kind, config))


@pytest.mark.parametrize(
    ("kind", "below", "leaves"),
    [
        ("qwen3_moe", "mlp", {"gate_proj": (24, 32), "up_proj": (24, 32), "down_proj": (32, 24)}),
        ("mixtral", "block_sparse_moe", {"w1": (48, 32), "w3": (48, 32), "w2": (32, 48)}),
    ],
)
def test_single_experts_of_transformers_4(
    kind: str, below: str, leaves: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    shapes = {
        f"model.layers.{layer}.{below}.experts.{expert}.{leaf}": shape
        for layer in range(2)
        for expert in range(4)
        for leaf, shape in leaves.items()
    }
    bakes_as_peft(kind, saved_adapter(tmp_path / "adapter", factors(shapes), sorted(leaves)))


@pytest.mark.parametrize(
    ("kind", "written"),
    [
        ("gemma3", "language_model.model.layers.1.self_attn.q_proj"),
        ("qwen2_5_vl", "model.layers.1.self_attn.q_proj"),
        ("llava", "model.layers.1.self_attn.q_proj"),
        ("qwen3_vl_moe", "model.layers.1.self_attn.q_proj"),
        ("nemotron_h", "backbone.layers.1.mixer.q_proj"),
    ],
)
def test_an_adapter_under_other_names_goes_to_the_same_weight(kind: str, written: str, tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", kind)
    tensors = factors({written: (32, 32)})
    adapter = saved_adapter(tmp_path / "adapter", tensors, ["q_proj"])
    ok("bake", str(adapter), "--base", str(base), "-o", "out")
    name = "model.layers.1.mixer.q_proj" if kind == "nemotron_h" else "model.language_model.layers.1.self_attn.q_proj"
    before, after = (loaded(folder, kind).get_parameter(f"{name}.weight") for folder in (base, Path("out")))
    delta = 2 * tensors[f"{written}.lora_B.weight"] @ tensors[f"{written}.lora_A.weight"]
    torch.testing.assert_close(after - before, delta, rtol=1e-4, atol=1e-5)


def test_an_embedding_that_is_tied_to_the_head_is_refused(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", "gpt2")
    tensors = {
        "transformer.wte.lora_embedding_A": torch.ones(2, 104),
        "transformer.wte.lora_embedding_B": torch.ones(32, 2),
    }
    adapter = saved_adapter(tmp_path / "adapter", tensors, ["wte"])
    assert "adapts transformer.wte, whose weight in acme/base is tied to lm_head" in refused(
        5, "bake", str(adapter), "--base", str(base), "-o", "out"
    )


def test_an_embedding_that_no_checkpoint_holds_is_refused(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", "marian")
    adapter = trained(tmp_path / "adapter", "marian", LoraConfig(r=2, target_modules=["embed_positions"]))
    told = refused(5, "bake", str(adapter), "--base", str(base), "-o", "out")
    assert "embed_positions is not in acme/base: its class computes it" in told


def test_a_weight_that_is_kept_in_another_arrangement_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = Stored({}, {"model.layers.0.self_attn.q_proj.weight": "Interleave"})
    monkeypatch.setattr(skeletons, "stored", lambda model, tensors: others)
    base = saved_base(tmp_path / "base", "llama")
    adapter = trained(tmp_path / "adapter", "llama", LoraConfig(r=2, target_modules=["q_proj"]))
    told = refused(5, "bake", str(adapter), "--base", str(base), "-o", "out")
    assert "self_attn.q_proj is kept in acme/base in another arrangement (Interleave): bake cannot add to it" in told
