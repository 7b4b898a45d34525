"""`lora export gguf` beside llama.cpp's own converter: seconds, CPU seconds and peak memory, in turns.

    python -m tests.bench.bench_gguf CONVERTER [DIR]     wants 2.5 GB in DIR, all of it removed at the end

CONVERTER is convert_lora_to_gguf.py in a checkout of llama.cpp, or in the source distribution of llama-cpp-python
(vendor/llama.cpp). The adapter has rank 64 in all seven modules of 32 layers in the shapes of an 8B model, in bf16: 336
MB. Both write fp32, bf16 and fp16; `lora` also hashes both files, reads its own back and compares. Everything is in the
page cache.
The parts of its time are measured in the same turns: a plan alone, hashes of both files alone, and `cp` of the result.
"""

import json
import os
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

from tests.bench.timing import timed

LAYERS, RUNS = 32, 3


def make(folder: Path) -> None:
    """The adapter, and the configuration of its base."""
    import torch

    from tests.adapters_on_disk import random_factors, write_adapter
    from tests.bench.bench_merge import LAYER

    (folder / "base").mkdir()
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    }
    (folder / "base" / "config.json").write_text(json.dumps(config))
    shapes = {f"model.layers.{layer}.{module}": shape for layer in range(LAYERS) for module, shape in LAYER.items()}
    factors = random_factors(shapes, 64, seed=1, dtype=torch.bfloat16)
    write_adapter(folder / "adapter", factors, base="base", lora_alpha=128)


def main(converter: Path, folder: Path) -> None:
    # Elsewhere: Linux counts what this process once held as the peak of every process that it starts.
    with ProcessPoolExecutor(1, get_context("spawn")) as other:
        other.submit(make, folder).result()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).resolve().parents[2])])
    theirs = [sys.executable, str(converter.resolve()), "--base", "base", "adapter", "--outfile", "theirs.gguf"]
    ours = [sys.executable, "-m", "lora_cli", "export", "gguf", "adapter", "--db", "bench.db"]
    types = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
    hashed = "import sys, hashlib\nfor file in sys.argv[1:]: hashlib.file_digest(open(file, 'rb'), 'sha256')"
    files = ["adapter/adapter_model.safetensors", "out/adapter.gguf"]
    cases = {
        f"{who}, {dtype}": command
        for dtype, name in types.items()
        for who, command in (
            ("`lora export gguf`", [*ours, "--dtype", dtype, "-o", "out" if dtype == "fp32" else dtype, "--force"]),
            ("`convert_lora_to_gguf.py`", [*theirs, "--outtype", name]),
        )
    } | {
        "`lora export gguf --dry-run`: imports, the adapter hashed": [*ours, "-o", "other", "--dry-run"],
        "SHA-256 of both files": [sys.executable, "-c", hashed, *files],
        "`cp` of the result": ["cp", "out/adapter.gguf", "copy.gguf"],
        "`import torch`": [sys.executable, "-c", "import torch"],
    }
    runs: dict[str, list[tuple[float, float, int]]] = {name: [] for name in cases}
    for _ in range(RUNS):
        for name, command in cases.items():
            # The pages that others wrote are on the disk before the next one starts.
            os.sync()
            runs[name].append(timed(*command, cwd=folder)[:3])
    print(f"torch {version('torch')}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.0f}, median of {RUNS}\n")
    print("| | seconds | CPU seconds | peak memory |\n|---|---|---|---|")
    for name, found in runs.items():
        seconds, cpu, peak = (statistics.median(column) for column in zip(*found, strict=True))
        print(f"| {name} | {seconds:.1f} | {cpu:.1f} | {peak / 1e9:.2f} GB |")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None, prefix="bench-gguf-") as made:
        main(Path(sys.argv[1]), Path(made))
