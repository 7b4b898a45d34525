"""The cheap methods beside PEFT's own, on the factors: what docs/benchmarks.md says of linear, cat and compat.

    python -m tests.bench.bench_peers

30 adapters of rank 16, one module; medians of seven runs each, taken in turns in one process.
"""

import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_cli.algebra.lowrank import LowRank
from lora_cli.algebra.updates import Updates
from lora_cli.merge_options import METHODS
from lora_cli.steps.merge.module import run_method

SHAPES = {"k": (1024, 4096), "q": (4096, 4096), "gate": (14336, 4096)}
N, RANK, RUNS = 30, 16, 7
PAIRS = (
    ("cat", "cat", {}),
    ("peft-linear", "linear", {}),
    ("peft-ties", "ties", {"density": 0.2}),
    ("peft-dare-linear", "dare_linear", {"density": 0.2}),
    ("peft-dare-ties", "dare_ties", {"density": 0.2}),
    ("peft-magnitude-prune", "magnitude_prune", {"density": 0.2}),
)


def main() -> None:
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {RUNS}\n")
    print("| method | module | ours s | PEFT s | ours / PEFT |\n|---|---|---|---|---|")
    for module, shape in SHAPES.items():
        beside_peft(module, shape)


def beside_peft(module: str, shape: tuple[int, int]) -> None:
    """The rows of one module."""
    g = torch.Generator().manual_seed(0)
    items = tuple(
        LowRank(torch.randn(shape[0], RANK, generator=g), torch.randn(RANK, shape[1], generator=g) / 64)
        for _ in range(N)
    )
    updates = Updates(items, keys=tuple(range(N)), scales=(1.0,) * N)
    weights = torch.full((N,), 1 / N, dtype=torch.float64)
    model = in_peft(items, shape)
    names = [f"a{i}" for i in range(N)]
    for ours, theirs, knobs in PAIRS:
        a, b = in_turns(
            partial(run_method, ours, updates, weights, METHODS.check(ours, knobs)),
            partial(model.add_weighted_adapter, names, [1 / N] * N, "merged", combination_type=theirs, **knobs),
            after=partial(model.delete_adapter, "merged"),
        )
        print(f"| {ours} | {module} | {a:.4f} | {b:.4f} | {a / b:.2f} |", flush=True)


def in_turns(
    one: Callable[[], object], other: Callable[[], object], after: Callable[[], object]
) -> tuple[float, float]:
    """Medians of two pieces of work, run in turns."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(RUNS + 1):
        for work, found in zip((one, other), times, strict=True):
            start = time.perf_counter()
            work()
            found.append(time.perf_counter() - start)
        after()
    return statistics.median(times[0][1:]), statistics.median(times[1][1:])


def in_peft(items: tuple[LowRank, ...], shape: tuple[int, int]) -> Any:
    """A model of one layer with all adapters applied."""
    base = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False))
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"])
    model = get_peft_model(base, config, adapter_name="a0")
    for i in range(1, N):
        model.add_adapter(f"a{i}", config)
    layer = model.base_model.model[0]
    for i, update in enumerate(items):
        layer.lora_A[f"a{i}"].weight.data, layer.lora_B[f"a{i}"].weight.data = update.A, update.B
    return model.base_model


if __name__ == "__main__":
    main()
