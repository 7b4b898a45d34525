"""What `pool verify --deep` finds unusual: false alarms, planted spikes, cost, and adaptersentry on the same files.

    python -m tests.bench.bench_unusual FOLDER [--adaptersentry PYTHON]

FOLDER keeps the trained adapters: the small world of `lora demo`, and 80 more on its base with ranks, targets, tasks,
steps and learning rates drawn at random; a first run takes some minutes. The real adapters are those of ../shared/wild,
compared with each other as if they were of one base. PYTHON is the interpreter of an environment with adaptersentry.
"""

import argparse
import json
import random
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from safetensors.numpy import load_file

from lora_cli.checks.spectra import Spreads, measure, spread_of
from lora_cli.checks.unusual import compare
from lora_cli.errors import LoraError
from lora_cli.formats.config import parse_config
from lora_cli.formats.header import read_header
from lora_cli.world import build
from lora_cli.world.pool import ALL, ATTENTION, FEED_FORWARD, POOLS, Pool, Recipe
from lora_cli.world.tasks import STRING_LENGTH
from tests.adapters_on_disk import random_factors, write_adapter
from tests.ordinary import Factors, ordinary, spiked

N, LAYERS, TRAINED, TRIALS = 200, 24, 80, 12
ZS = (4, 6, 8, 10, 14)
WILD = Path("../shared/wild")
WAYS = [(1, 3.0), (1, 10.0), (1, 30.0), (0, 10.0), (0, 30.0), (0, 100.0)]  # modules (0: all), strength
SCAN = """
import json, sys, time
from pathlib import Path
from adaptersentry import scan
for line in sys.stdin:
    begin = time.perf_counter()
    found = scan(Path(line.strip()) / "adapter_model.safetensors")
    intra = found.anomaly.intra
    scores = [getattr(intra, name, None) or 0.0 for name in ("max_robust_z", "max_concentration_z")]
    print(json.dumps([found.verdict.action, *scores, time.perf_counter() - begin]), flush=True)
"""


def on_disk(folder: Path) -> Spreads | None:
    """The spread of an adapter; None if it cannot be used or changes nothing."""
    weights = folder / "adapter_model.safetensors"
    try:
        found = measure(weights, read_header(weights), parse_config((folder / "adapter_config.json").read_bytes()))
    except (LoraError, OSError):
        return None
    return found if any(one.norm > 0 for one in found.values()) else None


def spreads_of(factors: Factors) -> Spreads:
    return {
        name: spread_of((b.T @ b)[None], (a @ a.T)[None], most=min(len(b), a.shape[1]))[0]
        for name, (b, a) in factors.items()
    }


def train(folder: Path) -> list[Path]:
    """The adapters trained on the small world's base."""
    from lora_cli.world.adapters import make_adapter

    world = build(folder / "world", size="small")
    tasks = sorted({recipe.task for recipe in POOLS["small"].recipes})
    torch.set_num_threads(1)
    for seed in range(TRAINED):
        rng, place = random.Random(seed), folder / "trained" / f"a{seed}"
        rank = rng.choice((2, 4, 8, 16, 32))
        recipe = Recipe(
            name=f"author/a{seed}",
            task=rng.choice(tasks),
            rank=rank,
            alpha=rank * rng.choice((1, 2, 4)),
            targets=rng.choice((ALL, ALL, ATTENTION, FEED_FORWARD, ("q_proj", "v_proj"))),
        )
        pool = Pool(recipes=(recipe,), steps=rng.choice((20, 40, 80, 120)), batch=16, rate=10 ** rng.uniform(-3.3, -2))
        if not place.exists():
            base, length = world.folder / "base", STRING_LENGTH["small"]
            make_adapter(recipe, pool, base, "lora-demo/tiny-llama-small", length, seed, place, frozenset())
    own = [world.folder / "pool" / adapter.name for adapter in world.adapters if not adapter.problem]
    return [*own, *sorted((folder / "trained").iterdir())]


def factors_of(folder: Path) -> Factors:
    """The factors of an adapter that is written as PEFT does, the scale folded in."""
    config = parse_config((folder / "adapter_config.json").read_bytes())
    tensors = load_file(folder / "adapter_model.safetensors")
    names = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    made = {}
    for name in names:
        a, b = (tensors[f"{name}.lora_{side}.weight"].astype(np.float64) for side in "AB")
        module = name.removeprefix("base_model.model.")
        made[module] = (b * config.scale(module, len(a)), a)
    return made


def alarms(title: str, pool: Sequence[Spreads]) -> None:
    scores = [abs(one.z) for one in compare(pool) if one is not None]
    shares = " | ".join(f"{np.mean(np.array(scores) > z):.1%} ({sum(s > z for s in scores)})" for z in ZS)
    print(f"| {title} | {len(scores)} | {np.median(scores):.1f} | {max(scores):.1f} | {shares} |", flush=True)


def planted(count: int, strength: float, keep_norm: bool, made: Sequence[Factors]) -> list[tuple[int, Factors]]:
    """TRIALS adapters with a spike, each with its place."""
    rng, found = np.random.default_rng(0), []
    while len(found) < TRIALS:
        place = int(rng.integers(len(made)))
        modules = [name for name, (_, a) in made[place].items() if len(a) > 1]
        if modules:
            chosen = [str(name) for name in rng.choice(modules, count)] if count else modules
            found.append((place, spiked(made[place], chosen, strength, seed=len(found), keep_norm=keep_norm)))
    return found


def place_of(scores: Sequence[float], own: int) -> int:
    return 1 + sum(score > scores[own] for score in scores)


def ranks(pool: Sequence[Spreads], spikes: Sequence[tuple[int, Factors]]) -> list[int]:
    found = []
    for place, factors in spikes:
        others = [*pool[:place], spreads_of(factors), *pool[place + 1 :]]
        found.append(place_of([abs(one.z) if one else 0.0 for one in compare(others)], place))
    return found


def told(found: Sequence[int]) -> str:
    return f"{sum(rank == 1 for rank in found)} of {len(found)}, median {np.median(found):.0f}, worst {max(found)}"


def scanned(python: str, folders: Sequence[Path]) -> list[tuple[str, float, float, float]]:
    """adaptersentry's action, largest single z, concentration z, and the seconds, of each folder."""
    lines = "\n".join(str(folder.absolute()) for folder in folders)
    done = subprocess.run([python, "-c", SCAN], input=lines, text=True, capture_output=True, check=True)
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def written(folder: Path, factors: Factors) -> Path:
    single = {name: (torch.tensor(b).float(), torch.tensor(a).float()) for name, (b, a) in factors.items()}
    return write_adapter(folder, single)


def beside_adaptersentry(python: str, made: Sequence[Factors], pool: Sequence[Spreads], real: Sequence[Path]) -> None:
    with TemporaryDirectory() as name:
        folders = [written(Path(name, f"a{place}"), factors) for place, factors in enumerate(made)]
        begin = time.perf_counter()
        compare([one for one in map(on_disk, folders) if one is not None])
        own = time.perf_counter() - begin
        found = scanned(python, folders)
        wild = scanned(python, real)
        print(f"\nseconds for {N} adapters: lora {own:.1f}, adaptersentry {sum(one[3] for one in found):.1f}")
        for title, them in (("generated", found), ("real", wild)):
            print(f"adaptersentry, {title}: {sum(one[0] != 'allow' for one in them)} of {len(them)} not 'allow'")
        print("\n| spike | kept norm | lora | adaptersentry, largest z | its concentration z | its action |")
        print("|---|---|---|---|---|---|")
        for count, strength in WAYS:
            for keep in (False, True):
                spikes = planted(count, strength, keep, made)
                put = [written(Path(name, f"s{count}-{strength}-{keep}-{i}"), one) for i, (_, one) in enumerate(spikes)]
                theirs = scanned(python, put)
                columns = []
                for column in (1, 2):
                    scores = [float(one[column]) for one in found]
                    columns.append(
                        [
                            place_of([*scores[:place], float(one[column]), *scores[place + 1 :]], place)
                            for (place, _), one in zip(spikes, theirs, strict=True)
                        ]
                    )
                what = f"{'one module' if count else 'every module'}, {strength:g} ×"
                raised = f"{sum(one[0] != 'allow' for one in theirs)} of {len(theirs)} raised"
                cells = [what, "yes" if keep else "no", told(ranks(pool, spikes)), *map(told, columns), raised]
                print(f"| {' | '.join(cells)} |", flush=True)


def cost() -> None:
    """A whole adapter of Llama-3.1-8B: q, k, v and o of 32 layers at rank 16 in bf16."""
    sides = {"q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096)}
    shapes = {f"model.layers.{i}.self_attn.{k}_proj": shape for i in range(32) for k, shape in sides.items()}
    with TemporaryDirectory() as name:
        folder = write_adapter(Path(name, "one"), random_factors(shapes, 16, seed=0, dtype=torch.bfloat16))
        seconds = []
        for _ in range(5):
            begin = time.perf_counter()
            on_disk(folder)
            seconds.append(time.perf_counter() - begin)
    print(f"\nLlama-8B q/k/v/o, rank 16, bf16: {np.median(seconds):.2f} s per adapter ({min(seconds):.2f} at best)")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--adaptersentry", metavar="PYTHON")
    asked = parser.parse_args()
    made = [ordinary(seed, LAYERS) for seed in range(N)]
    pool = [spreads_of(factors) for factors in made]
    folders = train(asked.folder)
    trained = [one for one in map(on_disk, folders) if one is not None]
    real = sorted(path.parent for path in WILD.glob("[am]*/*/adapter_model.safetensors"))
    head = " | ".join(f"above {z}" for z in ZS)
    print(f"| adapters | number | median of the largest z | largest | {head} |\n|---|---|---|---|{'---|' * len(ZS)}")
    alarms("generated", pool)
    alarms("trained on one small base", trained)
    alarms("trained, 20 of them", trained[::5][:20])
    alarms("real, of all bases", [one for one in map(on_disk, real) if one is not None])
    print("\n| spike | kept norm | first among the trained |\n|---|---|---|")
    factors = [factors_of(folder) for folder in folders]
    whole = [spreads_of(one) for one in factors]
    for count, strength in WAYS:
        for keep in (False, True):
            what = f"{'one module' if count else 'every module'}, {strength:g} ×"
            found = told(ranks(whole, planted(count, strength, keep, factors)))
            print(f"| {what} | {'yes' if keep else 'no'} | {found} |", flush=True)
    cost()
    if asked.adaptersentry:
        beside_adaptersentry(asked.adaptersentry, made, pool, real)


if __name__ == "__main__":
    main()
