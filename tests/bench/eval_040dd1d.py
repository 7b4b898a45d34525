"""Evaluation by commit 040dd1d, for bench_eval_together: eval_040dd1d.py WORLD METRIC THREADS EXAMPLES.

Run with PYTHONPATH set to a worktree of that commit. Prints its figures and answers as JSON.
"""

import importlib
import json
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch


def old(module: str) -> Any:
    """A module of that commit, which has others than today's."""
    return importlib.import_module(f"lora_cli.{module}")


def main(folder: str, metric: str, threads: str, examples: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(int(threads))
    reader, store, steps = old("adapters.reader"), old("adapters.store"), old("steps.evaluate")
    world = old("world").load(Path(folder))
    base = old("base_model").load(str(world.base), device="cpu", dtype="fp32")
    task = old("task").load_task(world.targets[0].test)[: int(examples)]
    systems = [steps.System(name="base")]
    for size in (1.0, 0.5):
        for one in world.usable:
            own = world.pool / one.name
            files = (own / "adapter_config.json", own / "adapter_model.safetensors")
            adapter = reader.open_adapter(store.AdapterFiles(store.folder_ref(own, one.name), *files))
            updates = {module: adapter.read(module).scaled(size) for module in adapter.modules}
            systems.append(steps.System(name=f"{one.name} x{size}", updates=updates, version=f"{one.name} x{size}"))
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "rows.jsonl")
        began, used = time.perf_counter(), time.process_time()
        steps.evaluate(base, systems, task, metric=metric, max_new_tokens=16, rows_path=file)
        figures = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - used}
        rows = [json.loads(line) for line in file.read_text().splitlines()]
    figures["mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    answers = {f"{row['system']} {row['id']}": row["text"] or "" for row in rows}
    print(json.dumps({"figures": figures, "answers": answers}))


if __name__ == "__main__":
    main(*sys.argv[1:])
