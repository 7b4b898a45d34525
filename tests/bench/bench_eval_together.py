"""Adapters evaluated together, one after the other, and by PEFT: python -m tests.bench.bench_eval_together [WORLD]

The pool of `lora demo` (WORLD is its folder; without one it is built, in minutes) and the same adapters at half their
size are 32 adapters; they answer prompts of the first task, beside the base. The ways take turns, each in a process of
its own:

- together: `evaluate`.
- one by one: `evaluate`, each adapter in a group of its own.
- as before: each adapter applied, likelihoods in batches of 16, then transformers' generation in batches of 16.
- 040dd1d: `evaluate` of that commit, if `--before` names a worktree of it.
- PEFT, batches of 8: `set_adapter`, then transformers' generation. It takes no likelihoods.
- PEFT, prompt by prompt: the same with one prompt at a time, as transformers' pipelines and lm-eval do by default.

Prints the medians of seconds, CPU seconds and peak memory, and the answers that differ from those of `together`.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from lora_cli.formats.reader import open_adapter
from lora_cli.formats.store import AdapterFiles, folder_ref
from lora_cli.models.base_model import BaseModel
from lora_cli.models.generate import stream
from lora_cli.models.ref import load
from lora_cli.recipes import EvalOptions
from lora_cli.records import Example
from lora_cli.steps.evaluate import groups as grouped
from lora_cli.steps.evaluate.evaluate import System, evaluate, read_rows
from lora_cli.task import load_task
from lora_cli.world import World, build
from lora_cli.world import load as load_world
from tests.paths import ROOT

PEFT = {"PEFT, batches of 8": 8, "PEFT, prompt by prompt": 1}
WAYS = ("together", "one by one", "as before", "040dd1d", *PEFT)
MOST, HALVES = 16, (1.0, 0.5)
Texts = dict[str, str]
"""The answer by "system example"."""


def systems_of(world: World) -> list[System]:
    """The base, the usable adapters of the pool, and each at half its size."""
    found = [System(name="base")]
    for size in HALVES:
        for one in world.usable:
            folder = world.pool / one.name
            files = (folder / "adapter_config.json", folder / "adapter_model.safetensors")
            adapter = open_adapter(AdapterFiles(folder_ref(folder, one.name), *files))
            updates = {module: adapter.read(module).scaled(size) for module in adapter.modules}
            found.append(System(name=f"{one.name} x{size}", updates=updates, version=f"{one.name} x{size}"))
    return found


def by_evaluate(base: BaseModel, systems: list[System], task: list[Example], metric: str) -> Texts:
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "rows.jsonl")
        evaluate(base, systems, task, EvalOptions(metric=metric, max_new_tokens=MOST), rows_path=file)
        return {f"{row.system} {row.id}": row.text or "" for row in read_rows(file)}


def as_before(base: BaseModel, systems: list[System], task: list[Example], metric: str) -> Texts:
    encoded, found = base.encode_all(task), {}
    for system in systems:
        with base.applied(system.updates):
            base.mean_log_likelihoods(encoded, batch_size=16)
            openings = [one.opening for one in encoded] if metric == "exact" else []
            for place, made in stream(base, openings, max_new_tokens=MOST, batch_size=16):
                found[f"{system.name} {task[place].id}"] = made.text
    return found


def by_peft(base: BaseModel, world: World) -> Any:
    """The base with all adapters, by PEFT, each of them at its two sizes."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    names = {f"{one.name} x{size}": one.name for size in HALVES for one in world.usable}
    wrapped: Any = None
    for number, (name, own) in enumerate(names.items()):
        place = {"adapter_name": str(number)}
        wrapped = PeftModel.from_pretrained(base.model, str(world.pool / own), **place) if wrapped is None else wrapped
        if number:
            wrapped.load_adapter(str(world.pool / own), **place)
        for module in wrapped.modules():
            if name.endswith(f" x{HALVES[1]}") and isinstance(module, LoraLayer) and str(number) in module.scaling:
                module.scaling[str(number)] *= HALVES[1]
    return wrapped, list(names)


@torch.no_grad()
def peft_answers(base: BaseModel, wrapped: Any, names: list[str], task: list[Example], at_once: int) -> Texts:
    encoded, found = base.encode_all(task), {}
    order = sorted(range(len(encoded)), key=lambda row: len(encoded[row].opening.ids))
    for number, name in [(None, "base"), *enumerate(names)]:
        if number is not None:
            wrapped.base_model.set_adapter(str(number))
            wrapped.base_model.enable_adapter_layers()
        else:
            wrapped.base_model.disable_adapter_layers()
        for start in range(0, len(order), at_once):
            rows = order[start : start + at_once]
            ids = [encoded[row].opening.ids for row in rows]
            width = max(map(len, ids))
            tokens = torch.tensor([[base.pad] * (width - len(one)) + [*one] for one in ids])
            mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in ids])
            ends = list(encoded[rows[0]].opening.ends)
            made = wrapped.generate(
                input_ids=tokens, attention_mask=mask, do_sample=False, max_new_tokens=MOST, eos_token_id=ends
            )
            for row, one in zip(rows, made[:, width:].tolist(), strict=True):
                kept = one[: next((at for at, token in enumerate(one) if token in ends), len(one))]
                found[f"{name} {task[row].id}"] = base.encoder.written(encoded[row].opening, kept)[0]
    return found


def worker(way: str, world: World, metric: str, threads: int, examples: int) -> None:
    """One way in this process; its figures and answers as JSON."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    base, task = load(str(world.base), device="cpu", dtype="fp32"), load_task(world.targets[0].test)[:examples]
    systems = systems_of(world)
    # Both the encoding of the examples and the making of PEFT's model are left out.
    base.encode_all(task)
    wrapped, names = by_peft(base, world) if way in PEFT else (None, [])
    if way == "one by one":
        grouped.MOST_TOGETHER = 1
    began, used = time.perf_counter(), time.process_time()
    if way in PEFT:
        found = peft_answers(base, wrapped, names, task, PEFT[way])
    else:
        found = (as_before if way == "as before" else by_evaluate)(base, systems, task, metric)
    figures = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - used}
    figures["mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"figures": figures, "answers": found}))


def run(way: str, world: World, metric: str, options: argparse.Namespace) -> Any:
    """What one way says in a process of its own."""
    words = ["-m", "tests.bench.bench_eval_together", str(world.folder.resolve()), "--way", way, "--metric", metric]
    words += ["--threads", str(options.threads), "--examples", str(options.examples)]
    environment = dict(os.environ)
    if way == "040dd1d":
        words = [
            str(ROOT / "tests/bench/eval_040dd1d.py"),
            words[2],
            metric,
            str(options.threads),
            str(options.examples),
        ]
        environment["PYTHONPATH"] = str(options.before.resolve())
    command = [sys.executable, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def table(world: World, metric: str, options: argparse.Namespace) -> None:
    left_out = {*PEFT} if metric != "exact" else set()
    ways = [way for way in WAYS if way not in left_out and (way != "040dd1d" or options.before)]
    figures: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    texts: dict[str, Texts] = {}
    for _ in range(options.repeats):
        for way in ways:
            said = run(way, world, metric, options)
            figures[way].append(said["figures"])
            texts[way] = said["answers"]
    middle = {
        way: {name: statistics.median(one[name] for one in every) for name in every[0]}
        for way, every in figures.items()
    }
    print(f"\n{metric}, {options.examples} prompts, {options.threads} threads, medians of {options.repeats}\n")
    print("| way | s | CPU s | times together's s | times its CPU s | peak MB | other answers |")
    print("|---|---|---|---|---|---|---|")
    ours = middle["together"]
    for way, one in middle.items():
        others = sum(texts[way].get(key) != text for key, text in texts["together"].items()) if texts[way] else "–"
        ratios = f"{one['seconds'] / ours['seconds']:.1f} | {one['cpu'] / ours['cpu']:.1f}"
        print(f"| {way} | {one['seconds']:.1f} | {one['cpu']:.1f} | {ratios} | {one['mb']:.0f} | {others} |")
    print(f"\n{len(texts['together']):,} answers", flush=True)


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("world", type=Path, nargs="?")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--examples", type=int, default=200)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--metric", choices=["exact", "nll"])
    options.add_argument("--way", choices=WAYS)
    options.add_argument("--before", type=Path)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        made = load_world(chosen.world) if chosen.world else build(Path(scratch, "world"), size="small")
        if chosen.way:
            worker(chosen.way, made, chosen.metric, chosen.threads, chosen.examples)
        else:
            for metric in [chosen.metric] if chosen.metric else ["exact", "nll"]:
                table(made, metric, chosen)
