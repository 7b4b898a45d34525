"""Merging beside PEFT: time and memory for 8B shapes. Prints the Markdown tables of docs/benchmarks.md.

    python -m tests.bench.bench_merge            one layer: ours beside PEFT, five runs each
    python -m tests.bench.bench_merge ties       TIES alone: beside PEFT's on deltas and a dense top-k, and its parts
    python -m tests.bench.bench_merge model DIR  224 modules, 30 adapters of 84 MB made in DIR, by the command line
    python -m tests.bench.bench_merge beside PYTHON DIR MODULES [OPTIONS]
                                                 some modules of one layer, in turns with the lora of another Python

Random Gaussian adapters are mutually near-orthogonal: the worst case for truncation and the slowest for TIES.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_cli.algebra.lowrank import LowRank, RankChoice, concat, reduce
from lora_cli.algebra.tiles import Ballot, Block, DeltaTiles
from lora_cli.algebra.updates import Updates
from lora_cli.merge_methods.ties import ties
from lora_cli.steps.merge.module import one_thread_each

LAYER = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
RANK, RUNS, DENSITY = 16, 5, 0.2
# On a shared machine a second thread makes either side slower or faster by what the neighbours do.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def factors(shape: tuple[int, int], n: int) -> list[LowRank]:
    """n random adapters of rank 16 in one module."""
    g = torch.Generator().manual_seed(0)
    return [
        LowRank(torch.randn(shape[0], RANK, generator=g), torch.randn(RANK, shape[1], generator=g) / 64)
        for _ in range(n)
    ]


def ours_sum(updates: list[LowRank]) -> LowRank:
    return reduce(concat(updates, [1.0] * len(updates)), RankChoice(ceiling=RANK)).update


def tiles(updates: list[LowRank], workers: int) -> DeltaTiles:
    n = len(updates)
    return DeltaTiles(Updates(tuple(updates), keys=tuple(range(n)), scales=(1.0,) * n), workers)


def ours_ties(updates: list[LowRank]) -> LowRank:
    return reduce(ours_ties_dense(updates), RankChoice(ceiling=RANK)).update


def ours_ties_dense(updates: list[LowRank]) -> Tensor:
    with one_thread_each() as workers:
        return ties(tiles(updates, workers), torch.ones(len(updates)), density=DENSITY)


def ours_ties_parts(updates: list[LowRank]) -> dict[str, float]:
    """Seconds of each part of a merge by TIES."""
    times = [time.perf_counter()]
    with one_thread_each() as workers:
        deltas = tiles(updates, workers)
        cuts = deltas.thresholds(DENSITY).tolist()
        times.append(time.perf_counter())

        def elect(block: Block) -> Tensor:
            ballot = Ballot(block)
            for tile, cut in zip(block, cuts, strict=True):
                ballot.cast(tile, 1.0, cut)
            return ballot.mean()

        dense = deltas.merge(elect)
    times.append(time.perf_counter())
    reduce(dense, RankChoice(ceiling=RANK))
    times.append(time.perf_counter())
    names = ("thresholds", "election", "SVD")
    return {name: end - start for name, start, end in zip(names, times, times[1:], strict=False)}


def peft_ties_dense(updates: list[LowRank]) -> Tensor:
    """What PEFT's ties_svd does before its SVD: its own function on dense deltas, all of them at once."""
    from peft.utils.merge_utils import ties as theirs

    deltas = [update.dense() for update in updates]
    merged: Tensor = theirs(deltas, torch.ones(len(deltas)), DENSITY)
    return merged


def topk_ties(updates: list[LowRank]) -> Tensor:
    """TIES as published code does it: a dense top-k of each adapter for the signs, and again for the mean."""
    total, count = torch.zeros(updates[0].shape), torch.zeros(updates[0].shape)
    for update in updates:
        total += _trimmed(update)
    sign = total.sign()
    total.zero_()
    for update in updates:
        kept = _trimmed(update)
        agree = (kept.sign() == sign) & (kept != 0)
        total += kept * agree
        count += agree
    return total / count.clamp(min=1)


def _trimmed(update: LowRank) -> Tensor:
    flat = update.dense().flatten()
    places = flat.abs().topk(round(DENSITY * flat.numel())).indices
    return torch.zeros_like(flat).index_copy_(0, places, flat[places]).view(update.shape)


def peft(updates: list[LowRank], combination: str) -> LowRank:
    """PEFT's add_weighted_adapter on a model of one module."""
    from peft import LoraConfig, get_peft_model

    out, inn = updates[0].shape
    with torch.device("meta"):
        base = nn.Sequential(nn.Linear(inn, out, bias=False))
    base = base.to_empty(device="cpu")
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"])
    model = get_peft_model(base, config, adapter_name="a0")
    for i in range(1, len(updates)):
        model.add_adapter(f"a{i}", config)
    layer = model.base_model.model[0]
    for i, update in enumerate(updates):
        layer.lora_A[f"a{i}"].weight.data = update.A
        layer.lora_B[f"a{i}"].weight.data = update.B
    start = time.perf_counter()
    names = [f"a{i}" for i in range(len(updates))]
    options = {"density": DENSITY} if "ties" in combination else {}
    model.base_model.add_weighted_adapter(
        names, [1.0] * len(names), "merged", combination_type=combination, svd_rank=RANK, **options
    )
    peft.seconds = time.perf_counter() - start  # type: ignore[attr-defined]
    return LowRank(layer.lora_B["merged"].weight.data, layer.lora_A["merged"].weight.data)


def one(what: str, module: str, n: int) -> None:
    """Run one case once in this process; print seconds, the rise of the peak memory and the size of the result."""
    warnings.simplefilter("ignore")
    updates = factors(LAYER[module], n)
    work: Callable[[], LowRank | Tensor | dict[str, float]] = {
        "sum": lambda: ours_sum(updates),
        "ties": lambda: ours_ties(updates),
        "ties-dense": lambda: ours_ties_dense(updates),
        "ties-parts": lambda: ours_ties_parts(updates),
        "topk-ties-dense": lambda: topk_ties(updates),
        "peft-svd": lambda: peft(updates, "svd"),
        "peft-ties_svd": lambda: peft(updates, "ties_svd"),
        "peft-ties-dense": lambda: peft_ties_dense(updates),
    }[what]
    if what.startswith("peft"):
        import peft as _  # noqa: F401
    elif "ties" in what:
        ours_ties(factors((256, 256), 2))  # libraries warm up, loops are compiled
    else:
        ours_sum(factors((64, 64), 2))
    before = _peak(reset=True)
    start = time.perf_counter()
    result = work()
    seconds = getattr(peft, "seconds", time.perf_counter() - start)
    rise = _peak() - before
    report: dict[str, float] = {"seconds": seconds, "rise": rise}
    if isinstance(result, dict):
        report |= result
    elif isinstance(result, LowRank) and "ties" not in what:
        exact = concat(updates, [1.0] * n)
        report["error"] = float(concat([exact, result], [1.0, -1.0]).norm() / exact.norm())
    print(json.dumps(report))


def _peak(*, reset: bool = False) -> int:
    """Highest resident memory of this process since the last reset, bytes (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    key = "VmRSS:" if reset else "VmHWM:"
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def measured(what: str, module: str, n: int, runs: int = RUNS) -> dict[str, float]:
    """Medians over fresh processes."""
    rows = []
    for _ in range(runs):
        command = [sys.executable, "-m", "tests.bench.bench_merge", "one", what, module, str(n)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **ONE_THREAD})
        rows.append(json.loads(done.stdout))
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def layer() -> None:
    print(f"torch {torch.__version__}, one thread, medians of {RUNS} fresh processes\n")
    print("| case | ours s | ours memory | PEFT s | PEFT memory | ratio | error ours / PEFT |")
    print("|---|---|---|---|---|---|---|")
    for what, peer, module, n in (
        ("sum", "peft-svd", "self_attn.k_proj", 30),
        ("sum", "peft-svd", "self_attn.q_proj", 30),
        ("ties", "peft-ties_svd", "self_attn.k_proj", 30),
    ):
        a, b = measured(what, module, n), measured(peer, module, n)
        print(
            f"| {what}, {module}, N={n}, rank {RANK} | {a['seconds']:.3f} | {a['rise'] / 1e9:.2f} GB "
            f"| {b['seconds']:.2f} | {b['rise'] / 1e9:.2f} GB | {b['seconds'] / a['seconds']:.0f}× "
            f"| {_shown(a)} / {_shown(b)} |",
            flush=True,
        )
    print("\n| all seven modules, N=30 | seconds | memory above the factors |\n|---|---|---|")
    for what in ("sum", "ties"):
        rows = [measured(what, module, 30, 1 if what == "ties" else RUNS) for module in LAYER]
        print(f"| {what} | {sum(r['seconds'] for r in rows):.1f} | {max(r['rise'] for r in rows) / 1e9:.2f} GB |")


def _shown(row: dict[str, float]) -> str:
    return f"{row['error']:.4f}" if "error" in row else "-"


def ties_rows(runs: int = 3) -> None:
    """TIES before any reduction of rank beside what others do, then the parts of ours, module by module."""
    print(f"torch {torch.__version__}, one thread, medians of {runs} fresh processes\n")
    print("| TIES to a dense result | seconds | ns per element and adapter | memory |\n|---|---|---|---|")
    for module, n in (("self_attn.k_proj", 30), ("mlp.gate_proj", 8)):
        for what in ("ties-dense", "peft-ties-dense", "topk-ties-dense"):
            row = measured(what, module, n, runs if what == "ties-dense" else 1)
            each = row["seconds"] / (n * LAYER[module][0] * LAYER[module][1]) * 1e9
            print(
                f"| {what}, {module}, N={n} | {row['seconds']:.2f} | {each:.1f} | {row['rise'] / 1e9:.2f} GB |",
                flush=True,
            )
    print("\n| N=30, rank 16, ns per element and adapter | thresholds | election | SVD | seconds | memory |")
    print("|---|---|---|---|---|---|")
    for module, (out, inn) in LAYER.items():
        row = measured("ties-parts", module, 30, runs)
        parts = " | ".join(f"{row[name] / (30 * out * inn) * 1e9:.2f}" for name in ("thresholds", "election", "SVD"))
        print(f"| {module} | {parts} | {row['seconds']:.2f} | {row['rise'] / 1e9:.2f} GB |", flush=True)


class Made(NamedTuple):
    """The adapters of a model that is made: (out, in) of a layer's modules, the number of layers and of adapters."""

    shapes: dict[str, tuple[int, int]] = LAYER
    layers: int = 32
    adapters: int = 30


def write_adapters(folder: Path, made: Made) -> list[str]:
    """The folders of random adapters of rank 16 in bf16; those that are there are left as they are."""
    folders = [folder / f"adapter{i:02d}" for i in range(made.adapters)]
    for i, target in enumerate(folders):
        if (target / "adapter_config.json").exists():
            continue
        target.mkdir(parents=True, exist_ok=True)
        g = torch.Generator().manual_seed(i)
        tensors = {}
        for n in range(made.layers):
            for name, (out, inn) in made.shapes.items():
                key = f"base_model.model.model.layers.{n}.{name}"
                tensors[f"{key}.lora_A.weight"] = (torch.randn(RANK, inn, generator=g) / 64).bfloat16()
                tensors[f"{key}.lora_B.weight"] = (torch.randn(out, RANK, generator=g) / 64).bfloat16()
        save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
        config = {"peft_type": "LORA", "base_model_name_or_path": "acme/8b", "r": RANK, "lora_alpha": RANK}
        config["target_modules"] = sorted({name.rpartition(".")[2] for name in made.shapes})
        (target / "adapter_config.json").write_text(json.dumps(config))
    return [str(one) for one in folders]


def model(
    folder: Path, *options: str, made: Made | None = None, python: str = sys.executable, limit: float = 3600
) -> float:
    """A whole 8B model through the command line: 30 adapters, 224 modules. Seconds of CPU.

    python: the interpreter whose lora merges. limit: seconds after which the merge is given up.
    """
    # Elsewhere than in this tree: Python would import its lora for any interpreter.
    folder = folder.resolve()
    adapters = write_adapters(folder, made or Made())
    # An older build refuses the catalogue of a newer one.
    db = folder / ("bench.db" if python == sys.executable else "other.db")
    command = [python, "-m", "lora_cli", "merge", "--db", str(db), "-o", str(folder / "merged")]
    start, before = time.perf_counter(), _children()
    try:
        subprocess.run([*command, "--force", *options, *adapters], check=True, timeout=limit, cwd=folder)
    except subprocess.TimeoutExpired:
        print(f"not done in {limit:.0f} s")
        return limit
    seconds, processor = time.perf_counter() - start, _children() - before
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    size = sum(f.stat().st_size for f in (folder / "merged").iterdir())
    print(
        f"{seconds:.1f} s, {processor:.1f} s of CPU, peak {peak / 1e9:.2f} GB, result {size / 1e6:.0f} MB, "
        f"{os.cpu_count()} CPUs",
        flush=True,
    )
    return processor


def _children() -> float:
    """Seconds of CPU of the processes that this one waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def beside(python: str, folder: Path, names: list[str], *options: str, runs: int = 3) -> None:
    """The command of this tree and that of another interpreter in turns, on some modules of one layer: medians."""
    made = Made({name: LAYER[name] for name in names or LAYER}, layers=1)
    ways = {"other": python, "this": sys.executable}
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(runs):
        for name, interpreter in ways.items():
            found[name].append(model(folder, *options, made=made, python=interpreter))
    other, this = (statistics.median(seconds) for seconds in found.values())
    print(
        f"{' '.join(options)}, {', '.join(made.shapes)}: {other:.1f} and {this:.1f} s of CPU, {other / this:.2f} times"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        one(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    elif sys.argv[1:2] == ["ties"]:
        ties_rows(*map(int, sys.argv[2:3]))
    elif sys.argv[1:2] == ["model"]:
        model(Path(sys.argv[2]), *sys.argv[3:])
    elif sys.argv[1:2] == ["beside"]:
        beside(sys.argv[2], Path(sys.argv[3]), [*filter(None, sys.argv[4].split(","))], *sys.argv[5:])
    else:
        layer()
