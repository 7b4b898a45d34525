"""`lora pool similarity` of 1,000 adapters: from sketches, and with --exact from the weights.

    python -m tests.bench.bench_sketches [ADAPTERS]

224 modules of 64 × 64 at rank 4 in fp32, 0.46 MB an adapter: the time from sketches depends on the number of modules,
that from the weights on their size too. Every tenth adapter has nine copies, from all but equal to hardly alike. Each
command is a process of its own; seconds and peak memory are medians of three, with --exact those of one.
"""

import json
import multiprocessing as mp
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SIDES, LAYERS, SIZE, RANK, RUNS, FAMILY = ("q", "k", "v", "o", "gate", "up", "down"), 32, 64, 4, 3, 10
SHAPES = {f"model.layers.{layer}.x.{side}_proj": (SIZE, SIZE) for layer in range(LAYERS) for side in SIDES}


class Cost(NamedTuple):
    """Of one process: seconds on the clock, of CPU over all threads, and the largest memory in bytes."""

    clock: float
    processor: float
    memory: float


def run(folder: Path, *words: str, out: str = "out") -> Cost:
    """One command of `lora` in `folder`, its stdout in the file `out` there."""
    # Nothing listens on port 9: no configuration of the base is looked for elsewhere.
    home = {
        "HOME": str(folder),
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "LORA_DB": str(folder / "catalogue.db"),
        "LORA_BASE": "acme/tiny",
    }
    begin = time.perf_counter()
    with (folder / out).open("w") as file, (folder / "talk").open("w") as talk:
        process = subprocess.Popen(
            [sys.executable, "-m", "lora_cli", *words],
            env={**os.environ, **home},
            stdout=file,
            stderr=talk,
        )
        _, status, used = os.wait4(process.pid, 0)
    assert status == 0, (folder / "talk").read_text()[-500:]
    return Cost(time.perf_counter() - begin, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)


def write_pool(folder: Path, count: int) -> None:
    """Families of an adapter and its copies, whose B is moved by noise of 1 % to three times its size."""
    from tests.adapters_on_disk import random_factors, write_adapter

    for family in range(count // FAMILY):
        first = random_factors(SHAPES, RANK, seed=family)
        for member, size in enumerate([0.0, *np.logspace(-2, 0.5, FAMILY - 1).tolist()]):
            noise = random_factors(SHAPES, RANK, seed=count + family * FAMILY + member)
            moved = {module: (b + size * noise[module][0], a) for module, (b, a) in first.items()}
            write_adapter(folder / f"f{family}" / f"a{member}", moved)


def cosines(document: Any) -> tuple[list[str], Any]:
    """The ids in alphabetical order, and their cosines."""
    ids = [row["id"] for row in document["rows"]]
    order = sorted(range(len(ids)), key=ids.__getitem__)
    return [ids[place] for place in order], np.array(document["cosines"])[np.ix_(order, order)]


def told(name: str, costs: list[Cost]) -> str:
    clock, processor, memory = (statistics.median(column) for column in zip(*costs, strict=True))
    return f"| {name} | {clock:.2f} | {processor:.2f} | {memory / 1e6:.0f} |"


def errors(folder: Path) -> None:
    """The difference of the two matrices, by the size of the cosine."""
    names, found = zip(
        *(cosines(json.loads((folder / file).read_text())) for file in ("sketches", "weights")), strict=True
    )
    assert names[0] == names[1]
    pairs = np.tril_indices(len(names[0]), -1)
    have, want = (matrix[pairs] for matrix in found)
    print("\n| cosine | pairs | mean error | standard deviation | largest |\n|---|---|---|---|---|")
    for low, high in ((-1, 0.3), (0.3, 0.7), (0.7, 0.95), (0.95, 0.99), (0.99, 1.01)):
        off = (have - want)[(want >= low) & (want < high)]
        row = f"{len(off):,} | {off.mean():+.5f} | {off.std():.5f} | {np.abs(off).max():.4f}"
        print(f"| {low if low > 0 else '…'} to {min(high, 1)} | {row} |")


def main(count: str = "1000") -> None:
    """Print a table of costs and one of errors."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        # A process counts the memory of the one that starts it, which therefore has to be small: without torch.
        writer = mp.get_context("spawn").Process(target=write_pool, args=(folder / "pool", int(count)))
        writer.start()
        writer.join()
        run(folder, "pool", "sync", "--from", str(folder / "pool"))
        run(folder, "select", "--by", "random", "-k", count)
        run(folder, "pool", "list", "-q", out="ids")
        sketched = run(folder, "pool", "verify", *(folder / "ids").read_text().split(), "--deep", "--jobs", "2")
        each, memory = sketched.processor / int(count), sketched.memory / 1e6
        print(f"verify --deep --jobs 2: {each:.3f} s of CPU an adapter, {memory:.0f} MB at most", flush=True)
        ways = {
            "process start (`lora --version`)": (RUNS, "version", ("--version",)),
            "from sketches": (RUNS, "rows", ("pool", "similarity")),
            "from sketches, --json": (RUNS, "sketches", ("pool", "similarity", "--json")),
            "from the weights, --json": (1, "weights", ("pool", "similarity", "--exact", "--json")),
        }
        print(f"\n| {count} adapters | s on the clock | s of CPU | MB |\n|---|---|---|---|")
        for name, (runs, out, words) in ways.items():
            print(told(name, [run(folder, *words, out=out) for _ in range(runs)]), flush=True)
        errors(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
