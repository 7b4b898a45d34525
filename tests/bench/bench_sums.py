"""Weighted sums and the methods on factors beside an earlier commit: the tables of docs/benchmarks.md.

    python -m tests.bench.bench_sums BEFORE                  one 1024 × 4096 module against number and rank of adapters
    python -m tests.bench.bench_sums BEFORE model DIR        an 8B model's layers 0 to 3 by the command line
    python -m tests.bench.bench_sums BEFORE start            two small adapters by the command line, torch alone

BEFORE is a worktree of the earlier commit. Every run is a process of its own, in turns; CPU seconds, medians of three.
For `model`, DIR holds the adapters that `bench_merge model DIR` makes.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

HERE = Path(__file__).parents[2]
CASES = ((20, 16), (200, 16), (10, 128))
METHODS_SHOWN = ("linear", "norm-matched", "wudi", "tsv", "core", "knots")
RUNS = 3


def one(name: str, n: int, rank: int) -> None:
    """CPU seconds of a method with its reduction to rank 16, on one thread."""
    import torch

    import lora_cli

    # 040dd1d had other rooms. An editable install would lend it today's, so they are not simply tried.
    today = Path(lora_cli.__file__).with_name("algebra").is_dir()
    algebra = "lora_cli.algebra" if today else "lora_cli.adapters"
    LowRank, RankChoice, reduce = (
        getattr(import_module(f"{algebra}.lowrank"), name) for name in ("LowRank", "RankChoice", "reduce")
    )
    Updates = import_module(f"{algebra}.updates").Updates
    METHODS = import_module("lora_cli.merge_options" if today else "lora_cli.steps.merge_plan").METHODS
    run_method = import_module("lora_cli.steps.merge.module" if today else "lora_cli.steps.merge_module").run_method
    torch.set_num_threads(1)

    def run(shape: tuple[int, int], n: int, rank: int) -> float:
        g = torch.Generator().manual_seed(0)
        items = tuple(
            LowRank(torch.randn(shape[0], rank, generator=g), torch.randn(rank, shape[1], generator=g) / 64)
            for _ in range(n)
        )
        updates = Updates(items, keys=tuple(range(n)), scales=(1.0,) * n)
        weights = torch.full((n,), 1 / n, dtype=torch.float64)
        start = time.process_time()
        reduce(run_method(name, updates, weights, METHODS.check(name, {})), RankChoice(ceiling=16))
        return time.process_time() - start

    run((96, 128), 20, 8)  # libraries warm up, loops are loaded
    print(run((1024, 4096), n, rank))


def of_child(tree: Path, command: list[str]) -> tuple[float, str]:
    """CPU seconds of a process that imports the code of a worktree, and what it printed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *command], check=True, capture_output=True, text=True, env=environment, cwd=tree
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def in_turns(before: Path, work: Callable[[Path], float]) -> tuple[float, float]:
    """Medians of the earlier and of this version."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(RUNS):
        for tree, found in zip((before, HERE), times, strict=True):
            found.append(work(tree))
    return statistics.median(times[0]), statistics.median(times[1])


def scaling(before: Path) -> None:
    print("| method | N, rank | before | now | ratio |\n|---|---|---|---|---|")
    for name in METHODS_SHOWN:
        for n, rank in CASES:
            command = [__file__, "one", name, str(n), str(rank)]
            a, b = in_turns(before, lambda tree, command=command: float(of_child(tree, command)[1]))  # type: ignore[misc]
            print(f"| {name} | {n}, {rank} | {a:.3f} | {b:.3f} | {a / b:.1f} |", flush=True)


def merging(before: Path, adapters: list[str], *options: str) -> tuple[float, float]:
    """CPU seconds of a merge from the command line."""
    with tempfile.TemporaryDirectory() as folder:

        def work(tree: Path) -> float:
            # Each version has a catalogue of its own: a newer one brings it up to date.
            own = [*options, "--db", f"{folder}/{tree.name}.db", "-o", f"{folder}/out", "--force"]
            return of_child(tree, ["-m", "lora_cli", "merge", *own, *adapters])[0]

        return in_turns(before, work)


def model(before: Path, folder: Path) -> None:
    adapters = sorted(str(one) for one in folder.glob("adapter*"))
    print("| 30 adapters, 4 layers | before | now | ratio |\n|---|---|---|---|")
    for name in ("linear", "norm-matched"):
        a, b = merging(before, adapters, "--method", name, "--scope", "layers=0-3")
        print(f"| {name} | {a:.1f} | {b:.1f} | {a / b:.2f} |", flush=True)


def start(before: Path) -> None:
    import torch
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        adapters = [f"{folder}/{name}" for name in ("one", "two")]
        for seed, adapter in enumerate(adapters):
            Path(adapter).mkdir()
            g = torch.Generator().manual_seed(seed)
            key = "base_model.model.model.layers.0.self_attn.q_proj"
            sides = {
                f"{key}.lora_A.weight": torch.randn(4, 64, generator=g),
                f"{key}.lora_B.weight": torch.randn(64, 4, generator=g),
            }
            save_file(sides, f"{adapter}/adapter_model.safetensors", metadata={"format": "pt"})
            config = {"peft_type": "LORA", "base_model_name_or_path": "acme/8b", "r": 4, "lora_alpha": 4}
            text = json.dumps({**config, "target_modules": ["q_proj"]})
            Path(adapter, "adapter_config.json").write_text(text)
        a, b = merging(before, adapters)
        alone = statistics.median(of_child(HERE, ["-c", "import torch"])[0] for _ in range(RUNS))
    print(f"two small adapters: before {a:.2f} s, now {b:.2f} s; import torch alone {alone:.2f} s")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["one", name, n, rank]:
            one(name, int(n), int(rank))
        case [before, "model", folder]:
            model(Path(before), Path(folder))
        case [before, "start"]:
            start(Path(before))
        case [before]:
            scaling(Path(before))
