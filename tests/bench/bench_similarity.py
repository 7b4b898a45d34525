"""All cosines of many adapters in one module: time by precision and by N, and the error against float64.

    python -m tests.bench.bench_similarity

The module is k of an 8B model, 1024 × 4096, rank 16. CPU seconds over the threads are given beside the clock: on a busy
machine they are what a quiet one would take.
"""

import statistics
import time

import torch

from lora_cli.algebra.lowrank import LowRank
from lora_cli.algebra.pairs import all_pairs, cosines
from lora_cli.steps.merge.module import one_thread_each

OUT, IN, RANK, N, RUNS = 1024, 4096, 16, 1000, 5
WIDE = (torch.float32, torch.float64)
FIRST = {"int8": (torch.int8, *WIDE), "bf16": (torch.bfloat16, *WIDE), "fp32": WIDE}


def unrelated(n: int, g: torch.Generator) -> list[LowRank]:
    """Adapters that share nothing."""
    return [LowRank(normal(g, OUT, RANK), normal(g, RANK, IN) / 64) for _ in range(n)]


def same_start(n: int, g: torch.Generator) -> list[LowRank]:
    """Adapters whose A started, and nearly stayed, the same: one seed of one trainer."""
    a = normal(g, RANK, IN) / 64
    return [LowRank(normal(g, OUT, RANK), a + 0.1 * normal(g, RANK, IN) / 64) for _ in range(n)]


def families(n: int, g: torch.Generator) -> list[LowRank]:
    """Unrelated adapters of which every tenth has nine copies, from all but equal to hardly alike."""
    made = []
    for first in unrelated(n // 10, g):
        made += [LowRank(first.B + size * normal(g, OUT, RANK), first.A) for size in torch.logspace(-4, 1, 10).tolist()]
    return made


def normal(g: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=g)


def seconds(updates: list[LowRank], precisions: tuple[torch.dtype, ...], runs: int) -> tuple[float, float]:
    """Median wall time, and least CPU time over the threads."""
    with one_thread_each() as workers:
        walls, processors = [], []
        for _ in range(runs):
            wall, processor = time.perf_counter(), time.process_time()
            all_pairs(updates, workers=workers, precisions=precisions)
            walls.append(time.perf_counter() - wall)
            processors.append((time.process_time() - processor) / workers)
    return statistics.median(walls), min(processors)


def exact(updates: list[LowRank]) -> torch.Tensor:
    """The cosines in float64."""
    return cosines(all_pairs(updates, workers=2, precisions=(torch.float64,)))


def errors(updates: list[LowRank], precisions: tuple[torch.dtype, ...]) -> tuple[float, float]:
    """Largest error of a cosine against float64, over all pairs and over those above 0.3."""
    want, found = exact(updates), cosines(all_pairs(updates, workers=2, precisions=precisions))
    off = (found - want).abs()
    return float(off.max()), float(off[want.abs() > 0.3].max())


def main() -> None:
    g = torch.Generator().manual_seed(0)
    pools = {make.__name__: make(N, g) for make in (unrelated, families, same_start)}
    print("| pool | first precision | s, median | CPU s / threads | max error | above 0.3 |\n|---|---|---|---|---|---|")
    for name, pool in pools.items():
        for label, precisions in FIRST.items():
            wall, processor = seconds(pool, precisions, RUNS if name == "unrelated" and label != "fp32" else 1)
            most, high = errors(pool[:200], precisions)
            print(f"| {name} | {label} | {wall:.2f} | {processor:.2f} | {most:.1e} | {high:.1e} |", flush=True)
    print("\n| N | s, median | CPU s / threads |\n|---|---|---|")
    for n in (100, 200, 300, 500, 700, 1000):
        wall, processor = seconds(pools["unrelated"][:n], FIRST["int8"], 3)
        print(f"| {n} | {wall:.2f} | {processor:.2f} |", flush=True)


if __name__ == "__main__":
    main()
