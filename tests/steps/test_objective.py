"""The cost of coefficients: by a metric on the loaded base, as dense weights have it, and by a command."""

import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_cli.errors import DataError, NothingMatched, Refused, UsageError
from lora_cli.formats.reader import OpenAdapter
from lora_cli.metrics.exact import exact
from lora_cli.models.base_model import BaseModel
from lora_cli.models.generate import generate
from lora_cli.models.mixture import Mixture
from lora_cli.recipes import FIT_METHODS, EvalOptions
from lora_cli.records import Example
from lora_cli.steps.fit.objective import cost_by_command, cost_by_metric
from tests.adapters_on_disk import random_factors, write_adapter
from tests.tiny_bases import characters, examples, llama, opened, tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPES = {"model.layers.0.mlp.up_proj": (48, 32), "model.layers.1.self_attn.q_proj": (32, 32)}
FACTORS = [random_factors(SHAPES, 2 + seed, seed=seed) for seed in range(2)]
THETAS = [(0.0, 0.0), (1.0, -0.5), (0.3, 2.0)]


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return llama()


@pytest.fixture(scope="module")
def mixture(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    folder = tmp_path_factory.mktemp("pool")
    pool: list[OpenAdapter] = [opened(write_adapter(folder / str(place), one)) for place, one in enumerate(FACTORS)]
    return Mixture(base, pool, FIT_METHODS.load("adaptive")(2, granularity="adapter", activation="linear"))


def dense(theta: tuple[float, ...]) -> BaseModel:
    """The base with the weighted sum of the updates in its weights."""
    model = tiny_llama()
    for module in SHAPES:
        added = sum(
            c * (one[module][0].double() @ one[module][1].double()) for c, one in zip(theta, FACTORS, strict=True)
        )
        weight = model.get_submodule(module).weight
        weight.data = (weight.data.double() + added).float()
    return BaseModel("acme/tiny", model, characters())


@pytest.mark.parametrize("theta", THETAS)
def test_a_metric_judges_what_dense_weights_do(base: BaseModel, mixture: Mixture, theta: tuple[float, ...]) -> None:
    reference, data = dense(theta), examples(6)
    cost = cost_by_metric(base, mixture, data, EvalOptions(metric="nll"))
    assert cost(theta) == pytest.approx(-math.fsum(reference.log_likelihoods(data)) / 6, rel=1e-4)

    # Half of the answers are what this model writes.
    written = generate(reference, [one.prompt for one in data], max_new_tokens=3)
    expected = [
        one if place % 2 else replace(one, completion=text)
        for place, (one, text) in enumerate(zip(data, written, strict=True))
        if text.strip()
    ]
    right = exact(
        generate(reference, [one.prompt for one in expected], max_new_tokens=3), [one.completion for one in expected]
    )
    cost = cost_by_metric(base, mixture, expected, EvalOptions(metric="exact", max_new_tokens=3, batch_size=4))
    assert cost(theta) == pytest.approx(-sum(right) / len(right))
    assert sum(right) > 0

    options = ("xy", "aa", "q")
    asked = [Example(id=one.id, prompt=one.prompt, completion="aa", choices=options) for one in data]
    sums = [
        [
            reference.encode(replace(one, completion=text)).tokens
            * reference.log_likelihoods([replace(one, completion=text)])[0]
            for text in options
        ]
        for one in asked
    ]
    taken = [values.index(max(values)) == 1 for values in sums]
    assert cost_by_metric(base, mixture, asked, EvalOptions(metric="choice"))(theta) == -sum(taken) / 6


def test_a_command_judges_the_folder_of_the_candidate(mixture: Mixture) -> None:
    seen: list[Path] = []

    def write(folder: Path) -> None:
        seen.append(write_adapter(folder, {module: (one.B, one.A) for module, one in mixture.updates().items()}))
        adapter = opened(folder)
        for module in SHAPES:
            wanted = sum(c * (one[module][0] @ one[module][1]) for c, one in zip(THETAS[1], FACTORS, strict=True))
            assert torch.allclose(adapter.read(module).dense(), torch.as_tensor(wanted), atol=1e-5)

    command = """sh -c 'echo weights: ; wc -c < "$LORA_ADAPTER/adapter_model.safetensors"'"""
    sizes: list[float] = []

    def sized(folder: Path) -> None:
        write(folder)
        sizes.append((folder / "adapter_model.safetensors").stat().st_size)

    cost = cost_by_command(mixture, command, sized, seconds=30)
    assert cost(THETAS[1]) == -sizes[0]
    assert not seen[0].exists()
    assert "LORA_ADAPTER" not in os.environ


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("sh -c 'echo oops >&2; exit 3'", r"^the objective sh -c 'echo oops .*' ended with code 3: oops$"),
        ("sh -c 'kill -9 $$'", r"ended by signal 9: it said nothing$"),
        ("true", r"printed '', not a number$"),
        ("sh -c 'echo 1; echo good'", r"printed 'good', not a number$"),
        ("./no-such-program 1", r"^the objective ./no-such-program 1 cannot be run: No such file or directory$"),
        ("echo nan", r"printed nan, which is not finite$"),
        ("sh -c 'sleep 60 & sleep 60'", r"takes more than 0\.2 s$"),
    ],
)
def test_a_command_that_gives_no_number_is_named(mixture: Mixture, command: str, said: str) -> None:
    cost, began = (
        cost_by_command(mixture, command, Path.mkdir, seconds=0.2 if "sleep" in command else 30),
        time.monotonic(),
    )
    with pytest.raises(Refused, match=said):
        cost(THETAS[0])
    assert time.monotonic() - began < 20


def test_children_of_a_command_end_with_it(mixture: Mixture, tmp_path: Path) -> None:
    cost = cost_by_command(mixture, f"sh -c 'sleep 60 & echo $! > {tmp_path}/child; echo 0.25'", Path.mkdir, seconds=30)
    assert cost(THETAS[0]) == -0.25
    child = Path(f"/proc/{(tmp_path / 'child').read_text().strip()}/stat")
    deadline = time.monotonic() + 10
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(child)


def alive(stat: Path) -> bool:
    try:
        return stat.read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_what_cannot_be_judged_is_said(base: BaseModel, mixture: Mixture) -> None:
    with pytest.raises(NothingMatched, match="no examples"):
        cost_by_metric(base, mixture, [], EvalOptions())
    with pytest.raises(DataError, match="1 of 1 example has more with 60 new ones"):
        cost_by_metric(base, mixture, examples(1), EvalOptions(max_new_tokens=60))
    with pytest.raises(DataError, match="no choices"):
        cost_by_metric(base, mixture, examples(1), EvalOptions(metric="choice"))
    for command, said in (("sh -c 'echo", "No closing quotation"), (" ", "the objective is empty")):
        with pytest.raises(UsageError, match=said):
            cost_by_command(mixture, command, Path.mkdir, seconds=1)
    make: Callable[[tuple[float, ...]], float] = cost_by_metric(base, mixture, examples(1), EvalOptions(metric="nll"))
    with pytest.raises(ValueError, match="3 parameters for a mixture of 2"):
        make((1.0, 2.0, 3.0))
