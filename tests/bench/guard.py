"""Ratios to peers beside the stored ones: python -m tests.bench.guard [--store]

Every case is measured in turns with a peer that does the same or the like plainly, on one thread, in seconds of CPU; a
ratio is that of the medians, and ratios.json has those that were stored. Ends with 1 if a ratio is twice the stored one
or more, in two rounds: a collapse, such as a loop that is no longer compiled. Less than that is left to the benches.

--store writes the table anew, on a processor with bf16, which alone has every case.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage

import torch

from lora_cli.algebra.lowrank import LowRank, RankChoice, concat, dense_svd, reduce
from lora_cli.algebra.pairs import all_pairs
from lora_cli.algebra.tiles import DeltaTiles
from lora_cli.algebra.updates import Updates
from lora_cli.merge_methods.breadcrumbs import breadcrumbs
from lora_cli.merge_methods.dare_ties import dare_ties
from lora_cli.merge_methods.ties import ties
from lora_cli.steps.bake.bake import add
from tests.adapters_on_disk import random_factors, write_adapter
from tests.bench.bench_merge import topk_ties

TABLE = Path(__file__).with_name("ratios.json")
RUNS, COLLAPSE = 3, 2.0
OUT, IN, RANK, N = 512, 2048, 16, 6
ALL_PAIRS = "all pairs, beside plain Gram matrices"
"""In the narrowest precision of the processor: its stored ratio is that of bf16."""
LEAST = 0.1  # seconds that are measured at once, by repeating what is shorter
Work = Callable[[], object]


def factors(n: int = N) -> list[LowRank]:
    """n unrelated updates."""
    g = torch.Generator().manual_seed(0)
    return [LowRank(torch.randn(OUT, RANK, generator=g), torch.randn(RANK, IN, generator=g) / 64) for _ in range(n)]


def cases(folder: Path) -> dict[str, tuple[Work, Work]]:
    """Our way and the peer's, by name."""
    updates, many = factors(), factors(120)
    ones = torch.ones(N, dtype=torch.float64)
    deltas = DeltaTiles(Updates(tuple(updates), keys=tuple(range(N)), scales=(1.0,) * N))
    dense = torch.randn(OUT, IN)
    weight = torch.randn(OUT, IN).bfloat16()
    # Peers write where there is memory: how dear fresh pages are depends on the neighbours.
    baked, room = torch.empty_like(weight), torch.empty(OUT, IN)
    shapes = {f"model.layers.0.self_attn.{side}_proj": (32, 32) for side in "qv"}
    pair = [write_adapter(folder / f"a{i}", random_factors(shapes, 4, seed=i)) for i in range(2)]
    command = [sys.executable, "-m", "lora_cli", "merge", "--db", str(folder / "x.db"), "--force"]
    merge = [*command, "-o", str(folder / "out"), *map(str, pair)]

    def summed() -> object:
        return torch.linalg.svd(sum((u.dense() for u in updates), torch.zeros(OUT, IN)), full_matrices=False)

    def plain_cosines() -> object:
        b, a = torch.cat([u.B.T for u in many]), torch.cat([u.A for u in many])
        return ((b @ b.T) * (a @ a.T)).view(len(many), RANK, len(many), RANK).sum((1, 3))

    return {
        "ties, beside a dense top-k": (lambda: ties(deltas, ones), lambda: topk_ties(updates)),
        "dare-ties, beside a dense top-k": (lambda: dare_ties(deltas, ones), lambda: topk_ties(updates)),
        "breadcrumbs, beside a dense top-k": (lambda: breadcrumbs(deltas, ones), lambda: topk_ties(updates)),
        "weighted sum, beside a dense SVD": (
            lambda: reduce(concat(updates, [1.0] * N), RankChoice(ceiling=RANK)),
            summed,
        ),
        "leading directions, beside a whole SVD": (
            lambda: dense_svd(dense, RANK),
            lambda: torch.linalg.svd(dense, full_matrices=False),
        ),
        ALL_PAIRS: (lambda: all_pairs(many), plain_cosines),
        "all pairs in fp32, beside plain Gram matrices": (
            lambda: all_pairs(many, precisions=(torch.float32, torch.float64)),
            plain_cosines,
        ),
        "bake, beside a plain sum": (
            lambda: add(weight, updates[0], torch.bfloat16),
            lambda: baked.copy_(torch.mm(updates[0].B, updates[0].A, out=room).add_(weight)),
        ),
        "lora merge, beside the import of torch": (
            lambda: run(merge),
            lambda: run([sys.executable, "-c", "import torch"]),
        ),
    }


def run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True)


def seconds(work: Work, times: int = 1) -> float:
    """Of CPU, of this process and of those that it started, for one call."""
    before, children = time.process_time(), getrusage(RUSAGE_CHILDREN)
    for _ in range(times):
        work()
    after, since = time.process_time(), getrusage(RUSAGE_CHILDREN)
    elsewhere = since.ru_utime - children.ru_utime + since.ru_stime - children.ru_stime
    return (after - before + elsewhere) / times


def ratio(ours: Work, peer: Work) -> float:
    """Our time over the peer's, in turns after one call of each."""
    seconds(ours), seconds(peer)
    times = [max(1, round(LEAST / max(seconds(work), 1e-4))) for work in (ours, peer)]
    found = [(seconds(ours, times[0]), seconds(peer, times[1])) for _ in range(RUNS)]
    return statistics.median(one for one, _ in found) / statistics.median(other for _, other in found)


def compared(ways: Mapping[str, tuple[Work, Work]], stored: Mapping[str, float]) -> tuple[dict[str, float], list[str]]:
    """The ratios, of which each is printed, and the names of those that collapsed."""
    print("| ours, beside the peer | stored | now | |\n|---|---|---|---|")
    found, collapsed = {}, []
    for name, (ours, peer) in ways.items():
        found[name] = ratio(ours, peer)
        limit = COLLAPSE * stored.get(name, float("inf"))
        if found[name] >= limit:  # once more: a busy machine is no collapse
            found[name] = min(found[name], ratio(ours, peer))
        collapsed += [name] if found[name] >= limit else []
        told = "collapsed" if found[name] >= limit else ""
        print(f"| {name} | {stored.get(name, float('nan')):.3f} | {found[name]:.3f} | {told} |", flush=True)
    return found, collapsed


def main(*options: str) -> int:
    torch.set_num_threads(1)
    stored = {} if options == ("--store",) else json.loads(TABLE.read_text())
    with tempfile.TemporaryDirectory() as place:
        ways = cases(Path(place))
        if not torch.cpu.get_capabilities().get("avx512_bf16"):
            del ways[ALL_PAIRS]
        found, collapsed = compared(ways, stored)
    if not stored:
        TABLE.write_text(json.dumps({name: round(value, 4) for name, value in found.items()}, indent=2) + "\n")
    return 1 if collapsed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
