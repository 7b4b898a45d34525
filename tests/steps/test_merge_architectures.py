"""`lora merge` on every architecture and form of adapter: PEFT applies the result as the sum of what it applies."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from tests.architectures import SPECS, agree, by_peft, by_us, config, factors, saved_adapter, skeleton, trained
from tests.cli import ok

pytestmark = pytest.mark.filterwarnings("ignore")

Deltas = dict[str, Tensor]


def base_of(kind: str) -> str:
    """A folder with the base's configuration, which is all that a merge needs of it."""
    Path("base").mkdir(exist_ok=True)
    config(kind).save_pretrained("base")
    return str(Path("base").resolve())


def settings(folder: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(folder) / "adapter_config.json").read_text())
    return found


def merges_as_peft(kind: str, *words: str, weights: tuple[float, float] = (0.7, -0.4)) -> None:
    """Merge the folders a and b into out, without loss of rank, and compare what PEFT and we make of it."""
    base = base_of(kind)
    listed = ",".join(map(str, weights))
    ok("merge", "a", "b", "--base", base, "-m", "linear", f"--weights={listed}", "--rank", "sum", "-o", "out", *words)
    wanted: Deltas = {}
    for folder, weight in zip("ab", weights, strict=True):
        for name, delta in by_peft(kind, Path(folder)).items():
            wanted[name] = wanted.get(name, 0) + weight * delta
    agree(by_peft(kind, Path("out")), wanted)
    agree({name: delta for name, delta in by_us(kind, Path("out")).items() if delta.any()}, wanted)


def declared(folder: Path, kind: str) -> None:
    """Say in an adapter's configuration that it is for the base in `base_of`."""
    (folder / "adapter_config.json").write_text(
        json.dumps({**settings(folder), "base_model_name_or_path": base_of(kind)})
    )


def two(kind: str, *configs: LoraConfig) -> None:
    """Adapters a and b as PEFT saves them."""
    for seed, (name, one) in enumerate(zip("ab", configs, strict=True)):
        declared(trained(Path(name), kind, one, seed=seed), kind)


def singles(name: str, kind: str, leaves: dict[str, tuple[int, int]], *, rank: int, **more: Any) -> None:
    """An adapter with factors of single experts, as transformers 4 names them."""
    shapes = {
        f"model.layers.{layer}.mlp.experts.{expert}.{leaf}": shape
        for layer in range(2)
        for expert in range(4)
        for leaf, shape in leaves.items()
    }
    tensors = factors(shapes, rank=rank, seed=rank)
    declared(saved_adapter(Path(name), tensors, sorted(leaves), **{"r": rank, "lora_alpha": 2 * rank} | more), kind)


QWEN = {"gate_proj": (24, 32), "up_proj": (24, 32), "down_proj": (32, 24)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SPECS)
def test_layers_embeddings_and_convolutions_of_every_architecture(kind: str) -> None:
    base = skeleton(kind)
    names = [
        name
        for name, matrix in base.matrices.items()
        if matrix.kind in ("linear", "conv", "embedding")
        # PEFT takes some names for those of experts, and refuses some modules of Mamba layers.
        and name.rpartition(".")[2] not in (base.retargeted or {"out_proj", "conv1d"})
        and name not in base.ties
    ]
    two(kind, LoraConfig(r=2, lora_alpha=6, target_modules=names), LoraConfig(r=3, target_modules=names[::2]))
    merges_as_peft(kind)
    assert (settings("out")["r"], settings("out")["rank_pattern"]) == (5, {})
    assert "target_parameters" not in settings("out")


@pytest.mark.slow
@pytest.mark.parametrize("compact", [(), ("--compact",)])
@pytest.mark.parametrize("kind", ["qwen3_moe", "qwen2_moe", "mixtral", "phimoe", "gpt_oss", "llama4_text"])
def test_fused_experts_and_routers_of_other_ranks(kind: str, compact: tuple[str, ...]) -> None:
    router = next(name for name in skeleton(kind).matrices if name.endswith((".gate", ".router")))
    routers = f"{router.rpartition('.')[2]}.weight"
    two(
        kind,
        LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"], target_parameters=["gate_up_proj", "down_proj"]),
        LoraConfig(r=3, target_modules=["q_proj", "k_proj"], target_parameters=["experts.down_proj", routers]),
    )
    merges_as_peft(kind, *compact)
    assert bool(settings("out")["rank_pattern"]) == bool(compact)


@pytest.mark.parametrize("words", [(), ("--compact",)])
@pytest.mark.parametrize(
    ("kind", "leaves"), [("qwen3_moe", QWEN), ("mixtral", {"w1": (48, 32), "w3": (48, 32), "w2": (32, 48)})]
)
def test_single_experts_keep_their_names_and_one_rank(
    kind: str, leaves: dict[str, tuple[int, int]], words: tuple[str, ...]
) -> None:
    singles("a", kind, leaves, rank=4)
    singles("b", kind, leaves, rank=8, rank_pattern={})
    merges_as_peft(kind, *words)
    assert settings("out")["target_modules"] == sorted(leaves)
    assert "use_rslora" not in settings("out") or not settings("out")["use_rslora"]


def test_single_experts_of_rslora_mean_what_was_trained() -> None:
    """PEFT makes their fused update too strong; the result says the trained one in a form that PEFT reads rightly."""
    singles("a", "qwen3_moe", QWEN, rank=4, use_rslora=True)
    base = base_of("qwen3_moe")
    ok("merge", "a", "--base", base, "-m", "linear", "-o", "out")
    trained_update = by_us("qwen3_moe", Path("a"))
    agree(by_peft("qwen3_moe", Path("out")), trained_update)
    too_strong = by_peft("qwen3_moe", Path("a"))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    torch.testing.assert_close(too_strong[name], trained_update[name] * 2**0.5, rtol=1e-5, atol=1e-6)


def test_a_scope_leaves_no_gate_without_down() -> None:
    singles("a", "qwen3_moe", QWEN, rank=2)
    singles("b", "qwen3_moe", QWEN, rank=3)
    base = base_of("qwen3_moe")
    for scope in ("modules=gate_proj", "modules=*.experts.2.*", "layers=1"):
        ok("merge", "a", "b", "--base", base, "-m", "linear", "--scope", scope, "-o", "out", "--force")
        found, wanted = by_peft("qwen3_moe", Path("out")), by_us("qwen3_moe", Path("out"))
        agree(found, {name: delta for name, delta in wanted.items() if delta.any()})
        assert found


def test_single_experts_merge_with_fused_ones() -> None:
    singles("a", "qwen3_moe", QWEN, rank=2)
    declared(
        trained(Path("b"), "qwen3_moe", LoraConfig(r=3, target_modules=["q_proj"], target_parameters=["gate_up_proj"])),
        "qwen3_moe",
    )
    merges_as_peft("qwen3_moe")
    assert "model.layers.0.mlp.experts.gate_up_proj" in settings("out")["target_parameters"]


def test_single_experts_that_peft_does_not_convert_become_fused_ones() -> None:
    singles("a", "qwen2_moe", QWEN, rank=2)
    singles("b", "qwen2_moe", QWEN, rank=3)
    told = ok("merge", "a", "b", "--base", base_of("qwen2_moe"), "-m", "linear", "--rank", "sum", "-o", "out")
    assert "PEFT does not apply factors of single experts on a Qwen2MoeForCausalLM" in told.err
    found = by_peft("qwen2_moe", Path("out"))
    one, other = (by_us("qwen2_moe", Path(name), fuse=True) for name in "ab")
    agree(found, {name: (one[name] + other[name]) / 2 for name in one})


def test_layers_whose_names_peft_takes_for_experts_are_written_by_parameter() -> None:
    names = ["model.layers.0.mlp.gate_proj", "model.layers.1.mlp.shared_experts.down_proj"]
    tensors = factors({names[0]: (48, 32), names[1]: (32, 24)})
    declared(saved_adapter(Path("a"), tensors, ["gate_proj", "down_proj"]), "deepseek_v3")
    told = ok("merge", "a", "--base", base_of("deepseek_v3"), "-m", "linear", "-o", "out")
    assert "PEFT takes model.layers.0.mlp.gate_proj for a part of the experts and does not apply it" in told.err
    found = by_peft("deepseek_v3", Path("out"))
    assert set(found) == {f"{name}.weight" for name in names}
    agree(found, by_us("deepseek_v3", Path("a")))


def test_a_compact_result_with_parameters_of_other_ranks_is_read_again() -> None:
    for name, leaf, rank in (("a", "gate_proj", 4), ("b", "down_proj", 2)):
        tensors = factors({f"model.layers.1.mlp.shared_experts.{leaf}": QWEN[leaf]}, rank=rank)
        declared(saved_adapter(Path(name), tensors, [leaf], r=rank), "deepseek_v3")
    base = base_of("deepseek_v3")
    ok("merge", "a", "b", "--base", base, "--compact", "-o", "out")
    assert len(settings("out")["rank_pattern"]) == 1
    agree(by_us("deepseek_v3", Path("out")), by_peft("deepseek_v3", Path("out")))
    ok("pool", "verify", "out", "--base", base)


@pytest.mark.parametrize("words", [("--energy", "0.7"), ("--rank", "2"), ("--energy", "0.7", "--compact")])
def test_a_reduced_result_is_what_peft_applies(words: tuple[str, ...]) -> None:
    singles("a", "qwen3_moe", QWEN, rank=4)
    singles("b", "qwen3_moe", QWEN, rank=8)
    ok("merge", "a", "b", "--base", base_of("qwen3_moe"), *words, "-o", "out")
    agree(by_peft("qwen3_moe", Path("out")), by_us("qwen3_moe", Path("out")))


def test_without_its_base_fused_experts_are_merged_too() -> None:
    fused = ["gate_up_proj", "down_proj"]
    for seed, name in enumerate("ab"):
        one = LoraConfig(r=2 + seed, target_modules=["q_proj"], target_parameters=fused)
        trained(Path(name), "qwen3_moe", one, seed=seed)
    ok("merge", "a", "b", "-m", "linear", "--rank", "sum", "-o", "out")
    one, other = (by_peft("qwen3_moe", Path(name)) for name in "ab")
    agree(by_peft("qwen3_moe", Path("out")), {name: (one[name] + other[name]) / 2 for name in one})


def test_target_modules_are_short_where_peft_finds_the_same_modules() -> None:
    names = ["q_proj", "v_proj"]
    two("llama", LoraConfig(r=2, target_modules=names), LoraConfig(r=2, target_modules=["q_proj"]))
    ok("merge", "a", "b", "--base", base_of("llama"), "-o", "short")
    ok("merge", "a", "b", "--base", base_of("llama"), "--scope", "layers=1", "-o", "long")
    assert settings("short")["target_modules"] == names
    assert settings("long")["target_modules"] == [f"model.layers.1.self_attn.{name}" for name in names]
