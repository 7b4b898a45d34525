"""`lora pool verify --deep` of adapters of 84 MB: peak memory by their number, and seconds beside SHA-256.

    python -m tests.bench.bench_verify

The seven linear layers of an 8B Llama in 32 layers at rank 16 in bf16. Twenty files of 1.7 GB in all stand for every
adapter, by hard links; each link is read, hashed and measured by itself, two at a time. The second run of each number
hashes the files alone: they were measured before. Each run is a process of its own.
"""

import hashlib
import multiprocessing as mp
import os
import statistics
import tempfile
import time
from pathlib import Path

from tests.bench.bench_sketches import run

COUNTS, FILES, RUNS, LAYERS, RANK = (48, 200, 1000), 20, 5, 32, 16
SIDES = {
    "self_attn.q": (4096, 4096), "self_attn.k": (1024, 4096), "self_attn.v": (1024, 4096), "self_attn.o": (4096, 4096),
    "mlp.gate": (14336, 4096), "mlp.up": (14336, 4096), "mlp.down": (4096, 14336),
}  # fmt: skip
SHAPES = {f"model.layers.{layer}.{side}_proj": shape for layer in range(LAYERS) for side, shape in SIDES.items()}
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def write_pool(folder: Path, count: int) -> None:
    """FILES adapters, and links to their files as further ones."""
    import torch

    from tests.adapters_on_disk import random_factors, write_adapter

    for number in range(count):
        place = folder / f"a{number:03d}"
        if number < FILES:
            write_adapter(place, random_factors(SHAPES, RANK, seed=number, dtype=torch.bfloat16), lora_alpha=1)
            continue
        place.mkdir()
        for name in (WEIGHTS, CONFIG):
            os.link(folder / f"a{number % FILES:03d}" / name, place / name)


def seconds_of_hash(file: Path) -> float:
    """The median time of SHA-256 over a file's bytes, which are in memory."""
    data, times = file.read_bytes(), []
    for _ in range(RUNS):
        begin = time.process_time()
        hashlib.sha256(data).digest()
        times.append(time.process_time() - begin)
    return statistics.median(times)


def main() -> None:
    """Print a row for each number of adapters."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        writer = mp.get_context("spawn").Process(target=write_pool, args=(folder / "pool", max(COUNTS)))
        writer.start()
        writer.join()
        file = folder / "pool" / "a000" / WEIGHTS
        run(folder, "pool", "sync", "--from", str(folder / "pool"))
        limit = seconds_of_hash(file)
        print(f"{file.stat().st_size / 1e6:.1f} MB a file; its SHA-256 takes {limit:.3f} s of CPU\n")
        print("| adapters | run | peak MB | s of CPU each | over SHA-256 | s on the clock each |")
        print("|---|---|---|---|---|---|", flush=True)
        for count in COUNTS:
            ids = [f"pool/a{number:03d}" for number in range(count)]
            for which, words in (("first", ["--force"]), ("second", [])):
                cost = run(folder, "pool", "verify", *ids, "--deep", "--jobs", "2", *words)
                processor, clock = cost.processor / count, cost.clock / count
                cells = f"{cost.memory / 1e6:.0f} | {processor:.2f} | {processor / limit:.1f} × | {clock:.2f}"
                print(f"| {count} | {which} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
