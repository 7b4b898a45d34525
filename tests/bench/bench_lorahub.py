"""What a search like LoraHub's costs: `python tests/bench/bench_lorahub.py [--threads 1] [--repeats 3]` prints a table.

Seconds of CPU for forty evaluations of one weight per adapter at the demo's size: by `lora fit --preset lorahub` in
generations of one batch, and by the way of LoraHub's code, where state dicts are summed, loaded into PEFT and
evaluated, one after another. The same with concatenated factors gives the same values as ours, which is checked;
LoraHub's sums of A and B apart give others.
"""

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

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
Factors = Mapping[str, tuple[Tensor, Tensor]]


def model() -> BaseModel:
    return BaseModel("demo", tiny_llama(**SIZE, initializer_range=0.1), characters())


def ours(folders: Sequence[Path], batch: Sequence[Encoded], weights: Tensor) -> list[float]:
    """Every weight by one mixture, a generation of CMA-ES at a time."""
    base, adapters = model(), [opened(folder) for folder in folders]
    mixture = Mixture(base, adapters, lorahub(len(adapters)).parameters)
    objective = ByLikelihood(base, mixture, batch, METRICS.get("nll"))
    found: list[float] = []
    with mixture.applied(base):
        for generation in weights.split(4 + int(3 * torch.tensor(float(len(adapters))).log())):
            found += objective.values(generation)
    return found


def reloaded(
    folder: Path, made: Sequence[Factors], batch: Sequence[Encoded], weights: Tensor, *, apart: bool, size: int
) -> list[float]:
    """Every weight by a new state dict for PEFT: A and B summed apart, or concatenated; `size` examples per pass."""
    from peft import PeftModel, set_peft_model_state_dict

    base = model()
    rank = RANK if apart else RANK * len(made)
    factors = made[0] if apart else {m: _joined(made, m, torch.ones(len(made))) for m in made[0]}
    adapted = PeftModel.from_pretrained(base.model, write_adapter(folder, factors, lora_alpha=rank))
    found = []
    for row in weights:
        state = {}
        for module in made[0]:
            b, a = _summed(made, module, row) if apart else _joined(made, module, row)
            state[f"base_model.model.{module}.lora_A.weight"] = a
            state[f"base_model.model.{module}.lora_B.weight"] = b
        set_peft_model_state_dict(adapted, state)
        with torch.no_grad():
            sums = torch.cat([base.completion_losses(batch[at : at + size]) for at in range(0, len(batch), size)])
        found.append(float((sums / torch.tensor([item.tokens for item in batch])).mean()))
    return found


def _summed(made: Sequence[Factors], module: str, row: Tensor) -> tuple[Tensor, Tensor]:
    pairs = list(zip(row, (one[module] for one in made), strict=True))
    return sum(w * b for w, (b, _) in pairs), sum(w * a for w, (_, a) in pairs)


def _joined(made: Sequence[Factors], module: str, row: Tensor) -> tuple[Tensor, Tensor]:
    pairs = list(zip(row, (one[module] for one in made), strict=True))
    return torch.cat([w * b for w, (b, _) in pairs], dim=1), torch.cat([a for _, (_, a) in pairs])


def row(root: Path, adapters: int, count: int, repeats: int) -> str:
    base = model()
    shapes = {name: shape for name, shape in base.shapes.items() if name != "lm_head"}
    made = [{m: (0.1 * b, a) for m, (b, a) in random_factors(shapes, RANK, seed=i).items()} for i in range(adapters)]
    folders = [write_adapter(root / f"{adapters}-{count}-{i}", one) for i, one in enumerate(made)]
    batch = base.encode_all(examples(count))
    weights = 0.5 * torch.randn(EVALUATIONS, adapters, generator=torch.Generator().manual_seed(0))
    places = iter(root / f"peft-{adapters}-{count}-{i}" for i in range(1000))

    def way(apart: bool, size: int) -> list[float]:
        return reloaded(next(places), made, batch, weights, apart=apart, size=size)

    cases: dict[str, Callable[[], list[float]]] = {
        "ours": lambda: ours(folders, batch, weights),
        "apart, batch 1": lambda: way(True, 1),
        "apart": lambda: way(True, count),
        "joined": lambda: way(False, count),
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    found = {name: run() for name, run in cases.items()}
    assert torch.allclose(torch.tensor(found["ours"]), torch.tensor(found["joined"]), atol=1e-4)
    for _ in range(repeats):
        for name, run in cases.items():
            began = time.process_time()
            run()
            seconds[name].append(time.process_time() - began)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    others = [f"{median[name]:.2f} s ({median[name] / median['ours']:.1f} ×)" for name in list(cases)[1:]]
    return f"| {adapters} | {count} | {median['ours']:.2f} s | {' | '.join(others)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    print(
        "| adapters | examples | ours | A and B summed, batch of 1 | A and B summed | concatenated |\n"
        + "|---" * 6
        + "|"
    )
    with tempfile.TemporaryDirectory() as scratch:
        for adapters, count in ((20, 5), (20, 20), (20, 80), (5, 20)):
            print(row(Path(scratch), adapters, count, options.repeats), flush=True)


if __name__ == "__main__":
    main()
