"""All figures of a GPU in under nine minutes: python -m tests.bench.gpu_table [--device cuda]

Prints Markdown tables: every merge method on the device beside the CPU; the elementwise kernels as a share of the
memory's bandwidth, which a copy in the same run gives; products as a share of the rate of a large product; a fit step;
`lora merge` of 30 adapters of an 8B model; adapters evaluated together on a base of 8B shapes with random weights.
What does not fit into the nine minutes is named and left out. Ends with 1 if a method differs by more than 1e-5.

`--device cpu --tiny` runs the same code at tiny sizes on tensors of the CPU, without the compiled loops: for tests.
"""

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lora_cli.algebra import kernels, tiles
from lora_cli.algebra.lowrank import RankChoice, concat, gram, reduce
from lora_cli.algebra.updates import Updates
from lora_cli.fit_methods.adaptive import adaptive
from lora_cli.merge_methods.ties import ties
from lora_cli.merge_options import METHODS
from lora_cli.models.base_model import BaseModel
from lora_cli.models.mixture import Mixture
from lora_cli.recipes import EvalOptions
from lora_cli.steps.evaluate.evaluate import System, evaluate
from tests.bench import bench_fit, bench_merge
from tests.merge_methods.test_merge_laws import case_of, mapped, merged
from tests.tiny_bases import characters, examples, tiny_llama

SECONDS, TOLERANCE, REPEATS = 540.0, 1e-5, 5
BEGAN = time.monotonic()


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large the cases are: entries of a copy and of a tile, sides of a product, adapters and layers of a model."""

    copied: int = 1 << 28
    tile: tuple[int, int] = (16384, 4096)
    side: int = 8192
    tokens: int = 2048
    adapters: int = 30
    layers: int = 32
    shrunk: int = 1

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the modules of a layer."""
        return {name: (out // self.shrunk, inn // self.shrunk) for name, (out, inn) in bench_merge.LAYER.items()}


TINY = Sizes(copied=1 << 14, tile=(64, 64), side=64, tokens=16, adapters=3, layers=1, shrunk=128)


@contextmanager
def without_loops() -> Iterator[None]:
    """The code that runs on a GPU, also on tensors of the CPU."""
    before, kernels.COMPILED = kernels.COMPILED, False
    try:
        yield
    finally:
        kernels.COMPILED = before


def seconds(device: torch.device, work: Callable[[], object]) -> float:
    """The median time of one call, when all that was asked of the device is done."""
    found = []
    for _ in range(REPEATS + 1):
        finish(device)
        began = time.perf_counter()
        work()
        finish(device)
        found.append(time.perf_counter() - began)
    return statistics.median(found[1:])


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak(device: torch.device) -> str:
    """The most memory of the device that was in use since this was last asked."""
    if device.type != "cuda":
        return "-"
    found = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return f"{found / 1e9:.2f} GB"


def methods(device: torch.device) -> bool:
    """Every merge method on the device, beside the same on the CPU, in both precisions; whether all agree."""
    print("\n| method | float64 | float32 |\n|---|---|---|")
    bad = []
    for name in sorted(METHODS.methods):
        updates, weights = case_of(name)
        errors = []
        for dtype in (torch.float64, torch.float32):
            here = mapped(updates, lambda u, dtype=dtype: u.to(dtype))
            here = dataclasses.replace(here, inputs=tuple(x.to(dtype) for x in here.inputs))
            there = mapped(here, lambda u: u.to(device))
            there = dataclasses.replace(there, inputs=tuple(x.to(device) for x in here.inputs))
            wanted = merged(name, here, weights).double()
            with without_loops():
                found = merged(name, there, weights).cpu().double()
            errors.append(float((found - wanted).norm() / wanted.norm()))
        bad += [name] if not errors[0] <= TOLERANCE else []
        print(f"| {name} | {errors[0]:.1e} | {errors[1]:.1e} |", flush=True)
    print(f"\nmore than {TOLERANCE:g} from the CPU in float64: {', '.join(bad) or 'none'}")
    return not bad


def elementwise(device: torch.device, sizes: Sizes) -> None:
    """Bytes that must be read and written at least, per second, beside those of a copy."""
    source = torch.randn(sizes.copied, device=device)
    copy = 8 * sizes.copied / seconds(device, lambda: source.clone())
    print(f"\na copy moves {copy / 1e9:.0f} GB/s\n\n| kernel | GB/s | share of the copy | memory |\n|---|---|---|---|")
    tile = torch.randn(sizes.tile, device=device)
    votes, sums = torch.zeros_like(tile), torch.zeros(4 * tile.numel(), device=device)
    b, a = torch.randn(sizes.tile[0], 16, device=device), torch.randn(16, sizes.tile[1], device=device)
    cases: dict[str, tuple[int, Callable[[], object]]] = {
        "form, rank 16": (4, lambda: torch.mm(b, a, out=tile)),
        "tally": (4, lambda: kernels.tally(tile, 5.0, 5.1)),
        "cast": (36, lambda: kernels.cast(tile, 0.5, 5.0, sums)),
        "vote": (12, lambda: kernels.vote(tile, 5.0, 1, votes)),
        "elected": (20, lambda: kernels.elected(sums, votes, total=True)),
        "uniform": (4, lambda: kernels.uniform(1, 2, 0, tile.numel(), device)),
        "squares": (4, lambda: kernels.squares(tile)),
    }
    with without_loops():
        for name, (bytes_each, work) in cases.items():
            peak(device)
            speed = bytes_each * tile.numel() / seconds(device, work)
            print(f"| {name} | {speed / 1e9:.1f} | {speed / copy:.0%} | {peak(device)} |", flush=True)


def products(device: torch.device, sizes: Sizes) -> None:
    """Floating-point operations per second beside those of one large product of the same precision."""
    print("\n| product | TFLOP/s | share of a large one | memory |\n|---|---|---|---|")
    rates = {}
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = torch.randn(sizes.side, sizes.side, device=device).to(dtype)
        rates[dtype] = 2 * sizes.side**3 / seconds(device, lambda x=x: x @ x)  # type: ignore[misc]
        print(f"| {dtype}, {sizes.side} × {sizes.side} | {rates[dtype] / 1e12:.2f} | | |")
    out, inn = sizes.shapes["self_attn.q_proj"]
    updates = [u.to(device) for u in bench_merge.factors((out, inn), sizes.adapters)]
    stack = concat(updates, [1.0] * len(updates))
    rank = stack.rank
    cases: dict[str, tuple[float, torch.dtype, Callable[[], object]]] = {
        "inner products of all adapters": (rank**2 * (out + inn), torch.float64, lambda: gram(updates)),
        "a weighted sum at rank 64, by QR": (
            4.0 * rank**2 * (out + inn),
            torch.float32,
            lambda: reduce(stack, RankChoice(ceiling=64)),
        ),
    }
    for name, (operations, dtype, work) in cases.items():
        peak(device)
        rate = operations / seconds(device, work)
        print(f"| {name} | {rate / 1e12:.2f} | {rate / rates[dtype]:.0%} | {peak(device)} |", flush=True)
    keys = tuple(range(len(updates)))
    deltas = tiles.DeltaTiles(Updates(tuple(updates), keys=keys, scales=(1.0,) * len(keys)))
    with without_loops():
        taken = seconds(device, lambda: ties(deltas, torch.ones(len(keys))))
    each = taken / (len(keys) * out * inn) * 1e9
    title = f"TIES of {len(keys)} adapters, {out} × {inn}"
    print(f"\n{title}: {taken:.3f} s, {each:.3f} ns per entry and adapter, {peak(device)}")


def fit(device: torch.device, sizes: Sizes, folder: Path) -> None:
    """One layer with the adapters, forward and backward, beside the bare layer."""
    width = sizes.shapes["self_attn.q_proj"][0]
    bench_fit.WIDTH, bench_fit.ADAPTERS = width, sizes.adapters
    base = bench_fit.LayerBase(bench_fit.OneLayer(width).to(device))
    base.device = device
    pool = bench_fit.pool(folder / "layer", {"layer": (width, width)}, 16)
    mixture = Mixture(base, pool, adaptive(sizes.adapters, init="average").parameters)
    x = torch.randn(8, sizes.tokens // 8, width, device=device, requires_grad=True)
    gradient = torch.randn_like(x)

    def bare() -> None:
        x.grad = None
        base.model(x).backward(gradient)

    def mixed() -> None:
        mixture.theta.grad = None
        with mixture.applied(base):
            bare()

    peak(device)
    alone, together = seconds(device, bare), seconds(device, mixed)
    print(
        f"\nfit step, {width} × {width}, {sizes.adapters} adapters, {sizes.tokens} tokens: {together * 1e3:.2f} ms, "
        f"{together / alone:.2f} times the bare layer, {peak(device)}"
    )


def together(device: torch.device, sizes: Sizes) -> None:
    """Adapters evaluated together by likelihood on a base of 8B shapes with random weights."""
    wide = {"hidden_size": 4096 // sizes.shrunk, "intermediate_size": 14336 // sizes.shrunk}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
    if sizes is TINY:
        heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "vocab_size": 104}
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    try:
        with torch.device(device):
            model = tiny_llama(**wide, **heads, num_hidden_layers=sizes.layers, initializer_range=0.02)
    finally:
        torch.set_default_dtype(torch.float32)
    base = BaseModel("random", model, characters())
    modules = {name: shape for name, shape in base.shapes.items() if name.endswith(("q_proj", "v_proj"))}
    systems = [System(name="base")]
    for place in range(sizes.adapters):
        updates = {name: bench_merge.factors(shape, 1)[0].scaled(1e-3) for name, shape in modules.items()}
        systems.append(System(name=f"a{place}", updates=updates, version=str(place)))
    task = examples(4 * sizes.tokens // 64)
    read = sum(len(one.ids) for one in base.encode_all(task)) * len(systems)
    peak(device)
    began = time.perf_counter()
    evaluate(base, systems, task, EvalOptions(metric="nll"))
    finish(device)
    taken = time.perf_counter() - began
    print(
        f"\n{len(systems)} systems together, {len(task)} examples, {base.dtype}: {read / taken:,.0f} tokens/s "
        f"({taken:.1f} s), {peak(device)}"
    )


def whole_model(device: torch.device, sizes: Sizes, folder: Path) -> None:
    """`lora merge` of the adapters of a whole model, whose files are in the page cache."""
    for method in ("linear", "norm-matched", "ties"):
        left = SECONDS - (time.monotonic() - BEGAN)
        print(f"\n`lora merge --method {method}`, {sizes.adapters} adapters, {sizes.layers} layers:", flush=True)
        options = ["--method", method, "--device", str(device)]
        made = bench_merge.Made(sizes.shapes, sizes.layers, sizes.adapters)
        bench_merge.model(folder, *options, made=made, limit=max(left, 1.0))


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", default="cuda")
    options.add_argument("--tiny", action="store_true")
    chosen = options.parse_args()
    device, sizes = torch.device(chosen.device), TINY if chosen.tiny else Sizes()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}")
    agree = methods(device)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        parts: dict[str, Callable[[], None]] = {
            "kernels": lambda: elementwise(device, sizes),
            "products": lambda: products(device, sizes),
            "fit": lambda: fit(device, sizes, folder),
            "merge": lambda: whole_model(device, sizes, folder / "model"),
            "eval": lambda: together(device, sizes),
        }
        for name, part in parts.items():
            if time.monotonic() - BEGAN > SECONDS:
                print(f"\n{name}: left out, the time is over")
            else:
                part()
    print(f"\n{time.monotonic() - BEGAN:.0f} s in all")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
