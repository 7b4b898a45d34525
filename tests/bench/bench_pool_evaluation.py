"""An evaluation of a large pool and a race over it: time, memory, answers asked, and what the race loses.

python -m tests.bench.bench_pool_evaluation [ADAPTERS] [METRIC]

The pool holds variants of the adapters of the miniature world: scaled, and with noise. The chosen are compared by their
scores on all examples.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lora_cli.world import World, build


def variants(world: World, folder: Path, count: int) -> None:
    """`count` adapters below `folder`, each one of the world's with another strength and some noise."""
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    sources = [world.pool / adapter.name for adapter in world.usable]
    for number in range(count):
        source, place = sources[number % len(sources)], folder / f"author{number % 97}" / f"lora{number}"
        place.mkdir(parents=True)
        shutil.copy(source / "adapter_config.json", place)
        strength, noise = rng.uniform(0.1, 1.3), rng.choice([0.0, 0.1, 0.3, 1.0])
        tensors = {
            name: strength * (tensor + noise * tensor.std() * torch.randn(tensor.shape, generator=generator))
            if "lora_B" in name
            else tensor
            for name, tensor in load_file(source / "adapter_model.safetensors").items()
        }
        save_file(tensors, place / "adapter_model.safetensors", metadata={"format": "pt"})


def measured(home: Path, *words: str) -> tuple[dict[str, object], float, float]:
    """The document that a command prints, its seconds and its peak memory in MB."""
    environment = {**os.environ, "LORA_DB": str(home / "lora.db"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    code = (
        "import sys\nfrom lora_cli.app import app\nfrom lora_cli.formats.run_record import peak_bytes\n"
        "try:\n    app(sys.argv[1:], prog_name='lora')\n"
        "finally:\n    print(peak_bytes(), file=sys.stderr)"
    )
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=home, env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout or "{}"), time.perf_counter() - begin, int(done.stderr.split()[-1]) / 1e6


def main(count: int = 960, metric: str = "nll") -> None:
    """Print a line per evaluation."""
    k = max(1, count // 32)
    with tempfile.TemporaryDirectory() as folder:
        world = build(Path(folder, "world"), size="test")
        home = world.folder
        variants(world, home / "many", count)
        measured(home, "pool", "sync", "--from", "many")
        task = ["--data", "task.jsonl", "--metric", metric, "--max-new-tokens", "8", "-k", str(count), "--json"]
        raced, seconds, memory = measured(home, "pool", "evaluate", *task[:-2], str(k), "--race", "--json")
        share = raced["answers"] / raced["answers_of_all"]  # type: ignore[operator]
        print(f"race for {k} of {count}: {share:.1%} of the answers, {seconds:.0f} s, {memory:.0f} MB", flush=True)
        whole, seconds, memory = measured(home, "pool", "evaluate", *task)
        print(f"the rest of all {raced['answers_of_all']}: {seconds:.0f} s, {memory:.0f} MB", flush=True)
        again, seconds, memory = measured(home, "pool", "evaluate", *task)
        print(f"again, all of them stored: {seconds:.0f} s, {memory:.0f} MB", flush=True)
        scores = {row["id"]: row["value"] for row in whole["rows"]}  # type: ignore[attr-defined]
        best = [row["id"] for row in whole["rows"][:k]]  # type: ignore[index]
        found = [row["id"] for row in raced["rows"]]  # type: ignore[attr-defined]
        means = [sum(scores[id] for id in ids) / k for ids in (best, found)]
        print(f"mean {metric} of the chosen: all answers {means[0]:.4f}, race {means[1]:.4f}")
        print(f"{len({*best} & {*found})} of {k} are the same")
        assert again["rows"] == whole["rows"]


if __name__ == "__main__":
    main(*[int(word) if word.isdigit() else word for word in sys.argv[1:]])  # type: ignore[arg-type]
