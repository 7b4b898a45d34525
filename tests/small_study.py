"""A study that takes seconds: a base with random weights, four adapters and a task, catalogued below one folder."""

import json
import shutil
from pathlib import Path
from typing import Any

from tests.adapters_on_disk import random_factors, write_adapter
from tests.cli import ok
from tests.tiny_bases import saved

SHAPES = {f"model.layers.{layer}.mlp.up_proj": (48, 32) for layer in range(2)}
SHORT = ("--steps", "4", "--target-steps", "4", "--target-rank", "2", "--metric", "nll", "--batch-size", "4")
GRID = ("--systems", "base,average,ties,adaptive,target", "--pools", "relevant,random,noise", "-k", "2")
WORDS = ("study", "--data", "task.jsonl", *GRID, "--seeds", "2", *SHORT)
"""The words of a study of 15 cells."""


def build(folder: Path) -> Path:
    """Base, pool, task and lora.toml in `folder`, which has a catalogue of its own beside them."""
    saved(folder / "base")
    for seed, name in enumerate("abcd"):
        write_adapter(folder / "pool" / "ann" / name, random_factors(SHAPES, 2, seed=seed), base=str(folder / "base"))
    lines = [f'{{"prompt": "say {number:02} ", "completion": "{number * 7 % 24}"}}\n' for number in range(24)]
    (folder / "task.jsonl").write_text("".join(lines), encoding="utf-8")
    settings = {"base": "base", "pool": "pool", "db": "lora.db"}
    (folder / "lora.toml").write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items()))
    return folder


def catalogued() -> None:
    """Sync the pool of the working folder; LORA_DB is not set."""
    ok("pool", "sync")


def results(folder: Path) -> dict[str, bytes]:
    """The result of every cell by its name, and the bytes of the table."""
    found = {file.parent.name: file.read_bytes() for file in folder.glob("cells/*/result.json")}
    return found | {"table": (folder / "table.jsonl").read_bytes()}


def forget(folder: Path) -> None:
    """Remove a study."""
    shutil.rmtree(folder, ignore_errors=True)


def table(folder: Path) -> list[dict[str, Any]]:
    """The rows of a table."""
    return [json.loads(line) for line in (folder / "table.jsonl").read_text().splitlines()]
