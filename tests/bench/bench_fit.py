"""What the adaptive layer costs: `python tests/bench/bench_fit.py [--threads 1] [--repeats 7]` prints two tables.

One 4096-wide layer with 30 adapters of rank 16, forward and backward (gradients of the input and of the coefficients),
beside the bare layer; and one fit step at the demo's size beside PEFT with 30 active adapters, which gets a
coefficient by its adapters' scaling and no gradients of A and B.
"""

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from lora_cli.fit_methods.adaptive import adaptive
from lora_cli.formats.reader import OpenAdapter
from lora_cli.formats.skeleton import Matrix, Skeleton
from lora_cli.models.base_model import BaseModel
from lora_cli.models.mixture import Mixture
from tests.adapters_on_disk import random_factors, write_adapter
from tests.tiny_bases import characters, examples, opened, tiny_llama

ADAPTERS, WIDTH = 30, 4096


def measured(cases: Mapping[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """CPU seconds of each case; the cases take turns, so that a busy moment of the machine hits them alike."""
    for run in cases.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, run in cases.items():
            began = time.process_time()
            run()
            seconds[name].append(time.process_time() - began)
    return seconds


def show(title: str, seconds: Mapping[str, list[float]]) -> None:
    reference = statistics.median(next(iter(seconds.values())))
    print(f"\n{title}\n\n| | median CPU ms | fastest | median, relative |\n|---|---|---|---|")
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"| {name} | {median * 1e3:.1f} | {min(values) * 1e3:.1f} | {median / reference:.2f} |")


class OneLayer(nn.Module):
    """A model that is one linear layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


class LayerBase(BaseModel):
    """A BaseModel around a bare layer: it has no tokenizer and generates nothing."""

    def __init__(self, model: nn.Module) -> None:
        self.name, self.model = "layer", model.requires_grad_(False)
        self.skeleton = Skeleton("", {"layer": Matrix("linear", (WIDTH, WIDTH), "layer.weight", (WIDTH, WIDTH))}, {})

    device = torch.device("cpu")
    dtype = torch.float32


def pool(folder: Path, shapes: Mapping[str, tuple[int, int]], rank: int, **config: object) -> list[OpenAdapter]:
    return [
        opened(write_adapter(folder / f"a{i}", random_factors(shapes, rank, seed=i), **config)) for i in range(ADAPTERS)
    ]


def wide_layer(folder: Path, repeats: int) -> None:
    base = LayerBase(OneLayer(WIDTH))
    mixture = Mixture(base, pool(folder, {"layer": (WIDTH, WIDTH)}, 16), adaptive(ADAPTERS, init="average").parameters)
    for tokens in (512, 2048):
        x = torch.randn(8, tokens // 8, WIDTH, requires_grad=True)
        gradient = torch.randn(8, tokens // 8, WIDTH)

        def bare(x: torch.Tensor = x, gradient: torch.Tensor = gradient) -> None:
            x.grad = None
            base.model(x).backward(gradient)

        def mixed(bare: Callable[[], None] = bare) -> None:
            mixture.theta.grad = None
            with mixture.applied(base):
                bare()

        title = f"{WIDTH} × {WIDTH}, {ADAPTERS} adapters of rank 16, {tokens} tokens, forward and backward"
        show(title, measured({"bare layer": bare, "with the mixture": mixed}, repeats))


def demo_size(folder: Path, repeats: int) -> None:
    from peft import LoraConfig, PeftModel
    from peft.tuners.lora import LoraLayer

    def model() -> nn.Module:
        return tiny_llama(
            hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_key_value_heads=4, initializer_range=0.1
        )

    base, alone = (BaseModel("demo", model(), characters()) for _ in range(2))
    shapes = {name: shape for name, shape in base.shapes.items() if name != "lm_head"}
    adapters = pool(folder, shapes, 8)
    mixture = Mixture(base, adapters, adaptive(ADAPTERS, init="average").parameters)
    batch = [base.encode(example) for example in examples(8)]

    def ours() -> None:
        mixture.theta.grad = None
        base.completion_losses(batch).sum().backward()

    warnings.simplefilter("ignore")
    other = BaseModel("demo", model(), characters())
    names = [f"a{i}" for i in range(ADAPTERS)]
    adapted = PeftModel.from_pretrained(other.model, folder / names[0], adapter_name=names[0])
    for name in names[1:]:
        adapted.load_adapter(folder / name, adapter_name=name)
    adapted.base_model.set_adapter(names)
    assert isinstance(adapted.peft_config[names[0]], LoraConfig)
    adapted.requires_grad_(False)
    layers = [module for module in adapted.modules() if isinstance(module, LoraLayer)]
    coefficients = torch.full((len(layers), ADAPTERS), 1 / ADAPTERS, requires_grad=True)

    def theirs() -> None:
        coefficients.grad = None
        for layer, row in zip(layers, coefficients.unbind(), strict=True):
            layer.scaling = dict(zip(names, row.unbind(), strict=True))
        other.completion_losses(batch).sum().backward()

    def bare() -> None:
        with torch.no_grad():
            alone.completion_losses(batch)

    title = f"Fit step, 3 layers of width 96, {ADAPTERS} adapters of rank 8 on 7 modules, 8 examples"
    with mixture.applied(base):  # once for all steps, as in a fit
        ours()
        theirs()
        assert mixture.theta.grad is not None
        assert coefficients.grad is not None
        assert torch.allclose(mixture.theta.grad.sum(), coefficients.grad.sum(), rtol=1e-3)
        show(
            title, measured({"mixture": ours, f"PEFT, {ADAPTERS} active": theirs, "base, forward only": bare}, repeats)
        )


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--repeats", type=int, default=7)
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        wide_layer(Path(scratch, "wide"), chosen.repeats)
        demo_size(Path(scratch, "demo"), chosen.repeats)
