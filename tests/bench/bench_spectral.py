"""The spectral methods from factors: seconds by method, shape and number of adapters, and TSV beside its dense form.

    python -m tests.bench.bench_spectral dense     TSV as its paper has it, on whole updates, beside ours
    python -m tests.bench.bench_spectral methods   every method on k, q and gate, 30 adapters
    python -m tests.bench.bench_spectral number    every method on k, 5 to 200 adapters

Random Gaussian adapters of rank 16, result left as factors. Prints Markdown.
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from lora_cli.algebra.lowrank import LowRank
from lora_cli.algebra.updates import Updates
from lora_cli.merge_options import METHODS
from lora_cli.steps.merge.module import run_method

SHAPES = {"k": (1024, 4096), "q": (4096, 4096), "gate": (14336, 4096)}
CASES = (
    ("tsv", {}),
    ("iso-c", {}),
    ("iso-cts", {}),
    ("knots", {"inside": "linear"}),
    ("knots", {"inside": "ties"}),
    ("core", {"inside": "linear"}),
    ("core", {"inside": "ties"}),
    ("core", {"inside": "tsv"}),
    ("ctm", {"inside": "ties"}),
    ("pico", {"inside": "linear"}),
)
RANK, RUNS = 16, 5


def adapters(shape: tuple[int, int], n: int) -> Updates:
    """n random adapters of rank 16 in one module."""
    g = torch.Generator().manual_seed(0)
    items = [
        LowRank(torch.randn(shape[0], RANK, generator=g), torch.randn(RANK, shape[1], generator=g) / 64)
        for _ in range(n)
    ]
    return Updates(tuple(items), keys=tuple(range(n)), scales=(1.0,) * n)


def ours(name: str, updates: Updates, knobs: dict[str, str]) -> LowRank | Tensor:
    return run_method(name, updates, torch.ones(len(updates), dtype=torch.float64), METHODS.check(name, knobs))


def dense_tsv(updates: Updates) -> Tensor:
    """TSV-M of its paper: an SVD of each dense update, leading vectors side by side, polar factors by SVD."""
    U, s, V = [], [], []
    for update in updates:
        u, values, vh = torch.linalg.svd(update.dense(), full_matrices=False)
        U.append(u[:, :RANK])
        s.append(values[:RANK])
        V.append(vh[:RANK].T)
    left, right = (_polar(torch.cat(parts, dim=1)) for parts in (U, V))
    return left @ torch.diag(torch.cat(s)) @ right.T


def _polar(X: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(X, full_matrices=False)
    nearest: Tensor = u @ vh
    return nearest


def seconds(work: Callable[[], object], runs: int = RUNS) -> float:
    """Median after a run that does not count; of three at most where one takes more than two seconds."""
    times = []
    for _ in range(1 + runs):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
        if len(times) > 3 and times[0] > 2:
            break
    return statistics.median(times[1:])


def dense() -> None:
    updates = adapters(SHAPES["k"], 4)
    slow, fast = seconds(lambda: dense_tsv(updates)), seconds(lambda: ours("tsv", updates, {}), 4 * RUNS)
    found = ours("tsv", updates, {})
    assert isinstance(found, LowRank)
    exact = dense_tsv(Updates(tuple(u.to(torch.float64) for u in updates), updates.keys, updates.scales))
    error = float((found.dense().double() - exact).norm() / exact.norm())
    print("| TSV on k, N = 4 | dense | from factors | ratio | error against float64 |\n|---|---|---|---|---|")
    print(
        f"| medians of {RUNS} and {4 * RUNS} | {slow:.2f} s | {fast * 1e3:.1f} ms | {slow / fast:.0f}× | {error:.1e} |"
    )


def methods() -> None:
    print(f"| N = 30, medians of {RUNS} | {' | '.join(f'{name}, s' for name in SHAPES)} |\n|---|---|---|---|")
    for name, knobs in CASES:
        row = [seconds(lambda: ours(name, updates, knobs)) for updates in (adapters(s, 30) for s in SHAPES.values())]  # noqa: B023
        print(f"| {_named(name, knobs)} | {' | '.join(f'{value:.2f}' for value in row)} |", flush=True)


def number(most: int = 200) -> None:
    counts = [n for n in (5, 10, 30, 60, 100, 200) if n <= most]
    print(f"| k, seconds | {' | '.join(f'N = {n}' for n in counts)} |\n|---|{'---|' * len(counts)}")
    for name, knobs in CASES:
        row = []
        for n in counts:
            updates = adapters(SHAPES["k"], n)
            row.append(seconds(lambda: ours(name, updates, knobs), RUNS if n <= 60 else 1))  # noqa: B023
        print(f"| {_named(name, knobs)} | {' | '.join(f'{value:.3f}' for value in row)} |", flush=True)


def _named(name: str, knobs: dict[str, str]) -> str:
    return f"{name}, {knobs['inside']} inside" if knobs else name


if __name__ == "__main__":
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    {"dense": dense, "methods": methods, "number": number}[sys.argv[1]]()
