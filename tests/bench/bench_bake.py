"""Baking beside `cp`: seconds, GB/s and peak memory on a base of two shards of 1 GB. Prints the table of docs/bake.md.

    python -m tests.bench.bench_bake [DIR]     wants 7 GB in DIR, all of it removed at the end

The base is random bf16 in the shapes of an 8B model (two layers a shard, and an embedding that is only copied); the
adapter has rank 16 in all seven modules of each layer and 0.0015 of the weights' norm. Everything is in the page cache.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.bench.bench_merge import LAYER, RANK
from tests.bench.timing import timed

SHARDS, LAYERS_EACH, RUNS = 2, 2, 3


def make_base(folder: Path) -> None:
    """Two shards with an index, and a configuration."""
    folder.mkdir()
    weight_map, total = {}, 0
    for shard in range(SHARDS):
        g = torch.Generator().manual_seed(shard)
        name = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        tensors = {f"model.extra_{shard}.weight": torch.randn(16384, 4096, generator=g).mul_(0.02).bfloat16()}
        for layer in range(shard * LAYERS_EACH, (shard + 1) * LAYERS_EACH):
            for module, shape in LAYER.items():
                key = f"model.layers.{layer}.{module}.weight"
                tensors[key] = torch.randn(shape, generator=g).mul_(0.02).bfloat16()
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16"}))


def make_adapter(folder: Path) -> None:
    """Rank 16, ‖ΔW‖ = 0.0015 ‖W‖ in every module."""
    folder.mkdir()
    g = torch.Generator().manual_seed(9)
    tensors = {}
    for layer in range(SHARDS * LAYERS_EACH):
        for module, (out, inn) in LAYER.items():
            key = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, inn, generator=g)
            tensors[f"{key}.lora_B.weight"] = torch.randn(out, RANK, generator=g) * (0.0015 * 0.02 / RANK**0.5)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "base_model_name_or_path": "base", "r": RANK, "lora_alpha": RANK}
    config["target_modules"] = sorted({name.rpartition(".")[2] for name in LAYER})
    (folder / "adapter_config.json").write_text(json.dumps(config))


def main(folder: Path) -> None:
    # Elsewhere: Linux counts what this process once held as the peak of every process that it starts.
    with ProcessPoolExecutor(1, get_context("spawn")) as other:
        other.submit(make_base, folder / "base").result()
        other.submit(make_adapter, folder / "adapter").result()
    size = sum(file.stat().st_size for file in (folder / "base").glob("*.safetensors"))
    os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    bake = [sys.executable, "-m", "lora_cli", "bake", "adapter", "--base", "base", "--db", "bench.db"]
    cases = {
        "`cp -r`": ["cp", "-r", "base", "out"],
        "`cp -r` and `sync`": ["sh", "-c", "cp -r base out && sync out/*.safetensors"],
        "`lora bake`, bf16": [*bake, "-o", "out"],
        "`lora bake --dtype fp32`": [*bake, "-o", "out", "--dtype", "fp32"],
    }
    print(f"{size / 1e9:.2f} GB, torch {torch.__version__}, {os.cpu_count()} CPUs, best of {RUNS}\n")
    print("| | seconds | CPU seconds | GB/s of base | peak memory |\n|---|---|---|---|---|")
    for name, command in cases.items():
        runs = []
        for _ in range(RUNS):
            runs.append(timed(*command, cwd=folder))
            subprocess.run(["rm", "-rf", "out"], cwd=folder, check=True)
        seconds, cpu, peak, told = min(runs)
        work = re.search(r"· ([\d.]+) s ·", told)
        inside = f" (the work itself {work[1]})" if work else ""
        speed = size / 1e9 / seconds
        print(f"| {name} | {seconds:.1f}{inside} | {cpu:.1f} | {speed:.2f} | {peak / 1e9:.2f} GB |", flush=True)
        if told:
            print(told.strip(), file=sys.stderr)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None, prefix="bench-bake-") as made:
        main(Path(made))
