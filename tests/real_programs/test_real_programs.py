"""Exports in the programs that they are for, beside PEFT: run by run.sh, which installs the programs.

The error is |logits(program) − logits(PEFT)| / |logits(PEFT) − logits(base)| over all tokens of one text.
"""

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from tests.adapters_on_disk import random_factors, write_adapter
from tests.cli import ok
from tests.real_programs.base_gguf import write_gpt2, write_llama
from tests.tiny_bases import STORIES, needs_stories

WORK = Path(os.environ.get("REAL_PROGRAMS", "/nowhere"))
IDS = [1, 403, 407, 261, 378, 388, 286, 411, 267, 275, 263, 401, 320, 265, 330, 412]
pytestmark = [
    pytest.mark.real,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    needs_stories,
    pytest.mark.skipif(not WORK.is_dir(), reason="run by tests/real_programs/run.sh, which installs the programs"),
]


def shapes_of(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Every linear layer of the layers of a Llama."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    pairs = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    attention = {"q_proj": (hidden, hidden), "k_proj": (pairs, hidden), "v_proj": (pairs, hidden)}
    attention["o_proj"] = (hidden, hidden)
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    return {
        f"model.layers.{layer}.{block}.{name}": shape
        for layer in range(config["num_hidden_layers"])
        for block, names in (("self_attn", attention), ("mlp", mlp))
        for name, shape in names.items()
    }


def adapters() -> list[str]:
    """Adapters of stories260K that change its logits by a tenth to a half of their norm."""
    shapes = shapes_of(json.loads((STORIES / "config.json").read_text()))
    ranks = {module: 4 + 4 * (place % 3) for place, module in enumerate(shapes)}
    patterns = {f"^{module}".replace(".", r"\."): rank for module, rank in ranks.items() if rank != 8}
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "one rank, one alpha": (8, {"lora_alpha": 16}),
        "rank_pattern and alpha_pattern": (
            ranks,
            {"r": 8, "lora_alpha": 16, "rank_pattern": patterns, "alpha_pattern": {"q_proj": 7}},
        ),
        "rslora": (8, {"lora_alpha": 6, "use_rslora": True}),
        "attention of one layer": (8, {"lora_alpha": 16, "layers_to_transform": [2]}),
    }
    for seed, (name, (rank, config)) in enumerate(kinds.items()):
        some = {m: s for m, s in shapes.items() if "one layer" not in name or ".2.self_attn" in m}
        factors = {m: (0.05 * b, a) for m, (b, a) in random_factors(some, rank, seed=seed).items()}
        write_adapter(Path(name), factors, base=str(STORIES), **config)
    return [*kinds]


def in_peft(base: Any, names: list[str]) -> list[np.ndarray[Any, Any]]:
    """Logits of the base, then with each adapter."""
    with torch.no_grad():
        found = [base().eval()(torch.tensor([IDS])).logits[0].numpy()]
        for name in names:
            model: Any = PeftModel.from_pretrained(base(), name)
            found.append(model.eval()(torch.tensor([IDS])).logits[0].numpy())
    return found


def errors(found: np.ndarray[Any, Any], wanted: list[np.ndarray[Any, Any]]) -> list[float]:
    return [
        float(np.linalg.norm(one - want) / np.linalg.norm(want - wanted[0]))
        for one, want in zip(found[1:], wanted[1:], strict=True)
    ]


def probe(program: str, *words: str) -> np.ndarray[Any, Any]:
    script = Path(__file__).with_name(f"probe_{program}.py")
    python = WORK / program / "bin" / "python"
    subprocess.run([python, script, *words], check=True, stderr=subprocess.DEVNULL)
    found: np.ndarray[Any, Any] = np.load("logits.npy")
    return found


def write_row(name: str, row: list[Any]) -> None:
    with (WORK / "table.md").open("a") as file:
        file.write("| " + " | ".join([name, *(f"{one:.1g}" for one in row)]) + " |\n")


def of_stories() -> Any:
    return AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)


def of_conv1d() -> list[np.ndarray[Any, Any]]:
    """Logits of a random GPT-2 in the folder base, then with the adapter mine of all its layers."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2)
    GPT2LMHeadModel(config).save_pretrained("base")
    shapes = {
        f"transformer.h.{layer}.{name}": shape
        for layer in range(2)
        for name, shape in (
            ("attn.c_attn", (96, 32)),
            ("attn.c_proj", (32, 32)),
            ("mlp.c_fc", (128, 32)),
            ("mlp.c_proj", (32, 128)),
        )
    }
    factors = {m: (0.2 * b, a) for m, (b, a) in random_factors(shapes, 4, seed=1).items()}
    write_adapter(Path("mine"), factors, base="base", fan_in_fan_out=True, lora_alpha=8)
    return in_peft(lambda: GPT2LMHeadModel.from_pretrained("base"), ["mine"])


def convert_to_openvino(folder: Path, to: str) -> None:
    """By optimum-intel, in fp32."""
    words = ["--task", "text-generation-with-past", "--weight-format", "fp32", "--model", folder, to]
    command = WORK / "openvino" / "bin" / "optimum-cli"
    subprocess.run([command, "export", "openvino", *words], check=True, stderr=subprocess.DEVNULL)


def after_the_text(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Log-probabilities of every token after the last one, from logits (tokens, vocabulary)."""
    return torch.from_numpy(logits[-1]).double().log_softmax(-1).numpy()


@pytest.mark.parametrize(("cache", "limit"), [("f32", 1e-5), ("f16", 1e-2)])
def test_llama_cpp_applies_what_peft_applies(cache: str, limit: float, own_home: Path) -> None:
    names = adapters()
    wanted = in_peft(of_stories, names)
    write_llama(STORIES, Path("base.gguf"))
    for name in names:
        ok("export", "gguf", name, "-o", f"for {name}")
    files = [f"for {name}/adapter.gguf" for name in names]
    found = errors(probe("llama", "base.gguf", cache, json.dumps(IDS), "logits.npy", *files), wanted)
    write_row(f"llama.cpp, {cache} cache", found)
    assert max(found) <= limit


def test_mlx_lm_applies_what_peft_applies(own_home: Path) -> None:
    names = adapters()
    wanted = in_peft(of_stories, names)
    for name in names:
        ok("export", "mlx", name, "-o", f"for {name}")
    folders = [f"for {name}" for name in names]
    found = errors(probe("mlx", str(STORIES), json.dumps(IDS), "logits.npy", *folders), wanted)
    write_row("mlx-lm", found)
    assert max(found) <= 1e-5


def test_openvino_genai_applies_what_peft_applies(own_home: Path) -> None:
    """MODE_FUSE multiplies B by A in bf16 on a CPU that has it, whatever the pipeline is told."""
    names = adapters()
    wanted = [after_the_text(one) for one in in_peft(of_stories, names)]
    convert_to_openvino(STORIES, "base")
    for name in names:
        ok("export", "openvino", name, "-o", f"for {name}")
    folders = [f"for {name}" for name in names]
    for mode, limit in (("AUTO", 1e-5), ("STATIC_RANK", 1e-5), ("STATIC", 1e-5), ("FUSE", 3e-2)):
        found = errors(probe("openvino", "base", f"MODE_{mode}", json.dumps(IDS), "logits.npy", *folders), wanted)
        write_row(f"OpenVINO GenAI, MODE_{mode}", found)
        assert max(found) <= limit


def test_openvino_genai_applies_an_adapter_of_conv1d(own_home: Path) -> None:
    wanted = [after_the_text(one) for one in of_conv1d()]
    convert_to_openvino(Path("base"), "converted")
    ok("export", "openvino", "mine", "-o", "out")
    found = errors(probe("openvino", "converted", "MODE_AUTO", json.dumps(IDS), "logits.npy", "out"), wanted)
    write_row("OpenVINO GenAI, GPT-2", found)
    assert max(found) <= 1e-5


def test_llama_cpp_applies_an_adapter_of_conv1d(own_home: Path) -> None:
    """llama.cpp's GELU is read from a table in fp16: the base alone is 1e-3 off."""
    wanted = of_conv1d()
    write_gpt2(Path("base"), Path("base.gguf"))
    ok("export", "gguf", "mine", "-o", "out")
    found = errors(probe("llama", "base.gguf", "f32", json.dumps(IDS), "logits.npy", "out/adapter.gguf"), wanted)
    write_row("llama.cpp, GPT-2", found)
    assert max(found) <= 1e-3
