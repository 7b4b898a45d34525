"""`lora extract` beside mergekit-extract-lora on one pair of models: seconds, processor time, memory, error.

    python -m tests.bench.bench_extract DIR [LAYERS] [MERGEKIT]     MERGEKIT is the program, by default on the PATH

The pair is a Llama of LAYERS layers (2048 wide, 5632 between, 4 of 32 heads for keys) in bf16, and the same with an
update of slowly falling spectrum in every linear layer. 11 layers are a pair of 2.2 GB. Both run at rank 32, in turns,
three times each; the median counts. Without mergekit (`-`), `lora extract` runs alone.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

RANK, RUNS = 32, 3
_MEASURED = """
import json, resource, subprocess, sys, time
began = time.time()
code = subprocess.run(sys.argv[1:], stdout=sys.stderr).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([code, time.time() - began, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024]))
"""


def make_pair(folder: Path, layers: int) -> None:
    """The base and the tuned model, in shards of 300 MB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32000,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "base", max_shard_size="300MB")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name:
                out, into = parameter.shape
                falling = 0.5 / torch.arange(1, 257) ** 0.7
                u, v = torch.randn(out, 256) / out**0.5, torch.randn(256, into) / into**0.5
                parameter.copy_(parameter.float() + (u * falling) @ v)
    model.save_pretrained(folder / "tuned", max_shard_size="300MB")


def measured(command: list[str], out: Path) -> tuple[float, float, float]:
    """Seconds, seconds of processor time, and MB of memory of a command that has to succeed."""
    shutil.rmtree(out, ignore_errors=True)
    done = subprocess.run([sys.executable, "-c", _MEASURED, *command], stdout=subprocess.PIPE, text=True, check=True)
    code, wall, cpu, memory = json.loads(done.stdout.splitlines()[-1])
    assert code == 0, command
    return wall, cpu, memory


def remainders(folder: Path, result: Path) -> dict[str, float]:
    """Module → the norm of the difference less the LoRA, in float64."""
    weights = [_whole(folder / name) for name in ("tuned", "base")]
    config = json.loads((result / "adapter_config.json").read_text())
    factors = load_file(result / "adapter_model.safetensors")
    found = {}
    for name in weights[0]:
        module = name.removesuffix(".weight")
        b = factors.get(f"base_model.model.{module}.lora_B.weight")
        if b is not None:
            a = factors[f"base_model.model.{module}.lora_A.weight"]
            update = config["lora_alpha"] / config["r"] * (b.double() @ a.double())
            found[module] = float(torch.linalg.norm(weights[0][name].double() - weights[1][name].double() - update))
    return found


def _whole(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def main(folder: str, layers: str = "11", mergekit: str = "mergekit-extract-lora") -> None:
    """Print the medians of both programs, their ratio, and the largest ratio of their errors."""
    place = Path(folder).absolute()
    if not (place / "tuned").exists():
        make_pair(place, int(layers))
    tuned, base = str(place / "tuned"), str(place / "base")
    os.environ["LORA_DB"] = str(place / "lora.db")
    commands = {"lora": [sys.executable, "-m", "lora_cli", "extract", tuned, "--base", base, "--rank", str(RANK), "-o"]}
    if mergekit != "-":
        own = ["--model", tuned, "--base-model", base, "--max-rank", str(RANK), "-e", "lm_head|embed_tokens|norm"]
        commands["mergekit"] = [mergekit, *own, "--out-path"]
    runs: dict[str, list[tuple[float, float, float]]] = {name: [] for name in commands}
    for _ in range(RUNS):
        for name, command in commands.items():
            runs[name].append(measured([*command, str(place / f"out-{name}")], place / f"out-{name}"))
            print(name, *(f"{value:.1f}" for value in runs[name][-1]), flush=True)
    medians = {name: [statistics.median(values) for values in zip(*found, strict=True)] for name, found in runs.items()}
    for name, (wall, cpu, memory) in medians.items():
        print(f"{name}: {wall:.1f} s, {cpu:.1f} s of processor time, {memory:.0f} MB")
    if mergekit != "-":
        (wall, cpu, _), (their_wall, their_cpu, _) = medians["lora"], medians["mergekit"]
        ours, theirs = (remainders(place, place / f"out-{name}") for name in ("lora", "mergekit"))
        worst = max(ours[module] / theirs[module] for module in theirs)
        print(
            f"{their_wall / wall:.1f} times in time, {their_cpu / cpu:.1f} in processor time; errors within {worst:.5f}"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
