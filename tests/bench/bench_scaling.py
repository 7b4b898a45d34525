"""Time against the number of adapters and against their rank, per method: the plot of docs/benchmarks.md.

    python -m tests.bench.bench_scaling docs/scaling.svg

One 1024 × 4096 module (k of an 8B model), the method and the reduction to rank 16, medians of three runs on random
adapters, on one thread as in a merge (elementwise methods on all). What takes longer than one second is run once.
"""

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure

from lora_cli.algebra.lowrank import LowRank, RankChoice, reduce
from lora_cli.algebra.updates import Updates
from lora_cli.merge_options import METHODS
from lora_cli.steps.merge.module import one_thread_each, run_method

SHAPE, RANK, N, RUNS = (1024, 4096), 16, 10, 3
COUNTS, RANKS = (5, 10, 20, 50, 100, 200), (4, 8, 16, 32, 64, 128)
SHOWN = ("linear", "norm-matched", "wudi", "tsv", "knots", "core", "lego", "ties")


def random_updates(n: int, rank: int) -> Updates:
    """n random adapters of one rank in the module."""
    g = torch.Generator().manual_seed(0)
    items = tuple(
        LowRank(torch.randn(SHAPE[0], rank, generator=g), torch.randn(rank, SHAPE[1], generator=g) / 64)
        for _ in range(n)
    )
    return Updates(items, keys=tuple(range(n)), scales=(1.0,) * n)


def seconds(name: str, n: int, rank: int) -> float:
    """Median time of one method, reduction included."""
    updates, weights = random_updates(n, rank), torch.full((n,), 1 / n, dtype=torch.float64)
    knobs: dict[str, Any] = METHODS.check(name, {})
    times: list[float] = []
    while len(times) < RUNS and not (times and times[0] > 1):
        start = time.perf_counter()
        with one_thread_each() as workers:
            reduce(run_method(name, updates, weights, knobs, workers=workers), RankChoice(ceiling=RANK))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main(file: Path) -> None:
    for name in SHOWN:
        seconds(name, 2, 4)  # compilers and libraries warm up
    against_n = {name: [seconds(name, n, RANK) for n in COUNTS] for name in SHOWN}
    against_rank = {name: [seconds(name, N, rank) for rank in RANKS] for name in SHOWN}
    for title, across, table in (("N", COUNTS, against_n), ("rank", RANKS, against_rank)):
        print(f"| {title} | " + " | ".join(map(str, across)) + " |\n|---|" + "---|" * len(across))
        for name, row in table.items():
            print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in row) + " |", flush=True)
        print()
    draw(file, against_n, against_rank)


def draw(file: Path, against_n: dict[str, list[float]], against_rank: dict[str, list[float]]) -> None:
    """Two panels, seconds on logarithmic axes."""
    matplotlib.rcParams["svg.hashsalt"] = "lora"
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, across, table, label in (
        (left, COUNTS, against_n, f"adapters of rank {RANK}"),
        (right, RANKS, against_rank, f"rank of {N} adapters"),
    ):
        for place, (name, row) in enumerate(table.items()):
            axes.plot(across, row, marker="osD^vP"[place % 6], markersize=4, color=f"C{place % 10}", label=name)
        axes.set(xscale="log", yscale="log", xlabel=label, xticks=across, xticklabels=across)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    left.set_ylabel("seconds, one 1024 × 4096 module")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
