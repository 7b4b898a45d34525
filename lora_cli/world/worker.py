"""The process that trains: reads one job per line from stdin, answers in JSON lines on stdout.

It runs in the world's folder. A job is `{"do": "base" | "adapter", "size", "seed", …}`. Answers are `{"step", "steps"}`
while the base is trained and `{"done": …}` at the end, or `{"failed": …}` when a file cannot be written. The process
ends with its stdin, and so with the process that started it. It works on one thread: with more, the sums, and so the
weights, would depend on the number of threads.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors import SafetensorError

from lora_cli.world.adapters import make_adapter
from lora_cli.world.base import train_base
from lora_cli.world.pool import POOLS
from lora_cli.world.tasks import STRING_LENGTH

# A relative path, so that a worker cannot recreate the removed folder of an abandoned world.
BASE = Path("base")

Report = Callable[[int, int], None]


def main() -> None:
    """Run the jobs from stdin."""
    # Send the output of libraries to stderr: stdout carries the answers alone.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for line in sys.stdin:
        job = json.loads(line)
        try:
            done = DUTIES[job["do"]](job, lambda step, steps: _answer(answers, {"step": step, "steps": steps}))
        except (OSError, SafetensorError) as error:
            _answer(answers, {"failed": str(error)})
        else:
            _answer(answers, {"done": done})


def _base(job: Mapping[str, Any], report: Report) -> tuple[float, ...]:
    train_base(job["size"], job["seed"], BASE, report)
    return ()


def _adapter(job: Mapping[str, Any], report: Report) -> tuple[float, ...]:
    del report  # an adapter takes a few seconds: only its end is reported
    pool = POOLS[job["size"]]
    return make_adapter(
        pool.recipe(job["name"]),
        pool,
        base=BASE,
        base_name=job["base_name"],
        length=STRING_LENGTH[job["size"]],
        seed=job["seed"],
        folder=Path("pool", job["name"]),
        exclude=frozenset(job["exclude"]),
    )


DUTIES: dict[str, Callable[[Mapping[str, Any], Report], tuple[float, ...]]] = {"base": _base, "adapter": _adapter}


def _answer(answers: TextIO, answer: Mapping[str, object]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()
