"""What a search like LoraHub's costs: `python tests/bench/bench_lorahub.py [--threads 1] [--repeats 3]` prints a table.

Seconds of CPU for forty evaluations of one weight per adapter at the demo's size: by `lora fit --preset lorahub` in
generations of one batch, and by the way of LoraHub's code, which loads each adapter into PEFT for its state dict, then
sums state dicts, loads the sum into PEFT and evaluates it, one after another. Each with and without the loading. The
base alone on the same tokens is the floor. Concatenated factors give the same values as ours, which is checked;
LoraHub's sums of A and B apart give others.
"""

import argparse
import copy
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from lora_cli.fit_methods.lorahub import lorahub
from lora_cli.metrics import METRICS
from lora_cli.models.base_model import BaseModel
from lora_cli.models.encode import Encoded
from lora_cli.models.mixture import Mixture
from lora_cli.steps.fit.objective import ByLikelihood
from tests.adapters_on_disk import random_factors, write_adapter
from tests.tiny_bases import characters, examples, opened, tiny_llama

EVALUATIONS, RANK = 40, 8
SIZE = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_key_value_heads": 4}


def model() -> BaseModel:
    return BaseModel("demo", tiny_llama(**SIZE, initializer_range=0.1), characters())


class Cost(NamedTuple):
    """The values of all weights, and the seconds of CPU for loading and for the evaluations."""

    values: list[float]
    loading: float
    evaluations: float


def ours(folders: Sequence[Path], batch: Sequence[Encoded], weights: Tensor) -> Cost:
    """Every weight by one mixture, a generation of CMA-ES at a time."""
    base, began = model(), time.process_time()
    mixture = Mixture(base, [opened(folder) for folder in folders], lorahub(len(folders)).parameters)
    objective = ByLikelihood(base, mixture, batch, METRICS.get("nll"))
    loaded, found = time.process_time(), list[float]()
    with mixture.applied(base):
        for generation in weights.split(4 + int(3 * torch.tensor(float(len(folders))).log())):
            found += objective.values(generation)
    return Cost(found, loaded - began, time.process_time() - loaded)


def reloaded(
    folders: Sequence[Path], folder: Path, batch: Sequence[Encoded], weights: Tensor, *, apart: bool, size: int
) -> Cost:
    """Every weight by a new state dict for PEFT: A and B summed apart, or concatenated; `size` examples per pass.

    `folder` gets an adapter of the shape of these sums.
    """
    from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

    base, began = model(), time.process_time()
    states = []
    for own in folders:
        wrapped = PeftModel.from_pretrained(base.model, own)
        states.append(copy.deepcopy(get_peft_model_state_dict(wrapped)))
        wrapped.unload()
    adapted = PeftModel.from_pretrained(base.model, folder)
    loaded, found = time.process_time(), []
    for row in weights.tolist():
        together = _summed if apart else _joined
        set_peft_model_state_dict(adapted, {key: together(states, key, row) for key in states[0]})
        with torch.no_grad():
            sums = torch.cat([base.completion_losses(batch[at : at + size]) for at in range(0, len(batch), size)])
        found.append(float((sums / torch.tensor([item.tokens for item in batch])).mean()))
    return Cost(found, loaded - began, time.process_time() - loaded)


def bare(batch: Sequence[Encoded]) -> Cost:
    """The base alone, on all examples as often as there are weights."""
    base = model()
    began, found = time.process_time(), []
    with torch.no_grad():
        for _ in range(EVALUATIONS):
            found.append(float(base.completion_losses(batch).mean()))
    return Cost(found, 0.0, time.process_time() - began)


def _summed(states: Sequence[Mapping[str, Tensor]], key: str, row: Sequence[float]) -> Tensor:
    total = torch.zeros(())
    for weight, state in zip(row, states, strict=True):
        total = total + weight * state[key]
    return total


def _joined(states: Sequence[Mapping[str, Tensor]], key: str, row: Sequence[float]) -> Tensor:
    if "lora_A" in key:
        return torch.cat([state[key] for state in states])
    return torch.cat([w * state[key] for w, state in zip(row, states, strict=True)], dim=1)


def row(root: Path, adapters: int, count: int, repeats: int) -> str:
    base = model()
    shapes = {name: shape for name, shape in base.shapes.items() if name != "lm_head"}
    made = [{m: (0.1 * b, a) for m, (b, a) in random_factors(shapes, RANK, seed=i).items()} for i in range(adapters)]
    folders = [write_adapter(root / f"{adapters}-{count}-{i}", one) for i, one in enumerate(made)]
    batch = base.encode_all(examples(count))
    weights = 0.5 * torch.randn(EVALUATIONS, adapters, generator=torch.Generator().manual_seed(0))
    sums = {}
    for apart in (True, False):
        rank = RANK if apart else RANK * adapters
        factors = random_factors(shapes, rank, seed=0)
        sums[apart] = write_adapter(root / f"sum-{adapters}-{count}-{rank}", factors, lora_alpha=rank)
    cases: dict[str, Callable[[], Cost]] = {
        "ours": lambda: ours(folders, batch, weights),
        "bare": lambda: bare(batch),
        "apart, batch 1": lambda: reloaded(folders, sums[True], batch, weights, apart=True, size=1),
        "apart": lambda: reloaded(folders, sums[True], batch, weights, apart=True, size=count),
        "joined": lambda: reloaded(folders, sums[False], batch, weights, apart=False, size=count),
    }
    costs = {name: [run()] for name, run in cases.items()}
    assert torch.allclose(*(torch.tensor(costs[name][0].values) for name in ("ours", "joined")), atol=1e-4)
    costs = {name: [] for name in cases}
    for _ in range(repeats):
        for name, run in cases.items():
            costs[name].append(run())
    cells = [f"{adapters}", f"{count}"]
    for which in (lambda cost: cost.loading + cost.evaluations, lambda cost: cost.evaluations):
        median = {name: statistics.median(map(which, each)) for name, each in costs.items()}
        cells += [f"{median['ours']:.2f} s"]
        cells += [f"{median[name]:.2f} s ({median[name] / median['ours']:.1f} ×)" for name in list(cases)[2:]]
    return f"| {' | '.join(cells)} | {median['bare']:.2f} s |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    ways = ["ours", "A and B summed, batch of 1", "A and B summed", "concatenated"]
    columns = ["adapters", "examples", *ways, *(f"{way}, loaded before" for way in ways), "base alone"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    with tempfile.TemporaryDirectory() as scratch:
        for adapters, count in ((20, 5), (20, 20), (20, 80), (5, 20)):
            print(row(Path(scratch), adapters, count, options.repeats), flush=True)


if __name__ == "__main__":
    main()
