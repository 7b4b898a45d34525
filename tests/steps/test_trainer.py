"""The loop that fit and train share: passes, trace, time limit, layers computed again; and trials by several seeds."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from lora_cli.errors import Refused
from lora_cli.fit_methods.adaptive import adaptive
from lora_cli.formats.reader import OpenAdapter
from lora_cli.models.base_model import BaseModel
from lora_cli.models.mixture import Mixture
from lora_cli.models.recompute import recomputed
from lora_cli.recipes import Recipe, Shape
from lora_cli.records import Example
from lora_cli.steps.fit.fit import Fitting, fit
from lora_cli.steps.train.descent import TOKENS_PER_PASS, Checkpoint, Parts, learn, passes, write_trace
from lora_cli.task import HeldOut, split
from tests.adapters_on_disk import random_factors, write_adapter
from tests.tiny_bases import examples, gpt2, llama, opened

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = Recipe(steps=12, every=5, lr=5e-2)


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return llama()


@pytest.fixture(scope="module")
def pool(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> list[OpenAdapter]:
    return two_adapters(base, tmp_path_factory.mktemp("pool"))


def two_adapters(base: BaseModel, folder: Path, **config: Any) -> list[OpenAdapter]:
    shapes = {name: shape for name, shape in base.shapes.items() if name != "lm_head"}
    return [opened(write_adapter(folder / f"a{i}", random_factors(shapes, 2, seed=i), **config)) for i in range(2)]


def test_a_pass_fits_into_memory_and_holds_little_padding() -> None:
    lengths = [700, 20, 650, 30, 25, 4000, 700, 4000, 4000, 9000]
    found = passes(lengths)
    assert sorted(row for rows in found for row in rows) == [*range(10)]
    assert found == [[9], [5, 7], [8], [0, 6, 2], [3, 4, 1]]
    for rows in found:
        longest = max(lengths[row] for row in rows)
        assert len(rows) * longest <= TOKENS_PER_PASS or len(rows) == 1
        assert sum(longest - lengths[row] for row in rows) <= 512
    assert passes([5] * 8) == [[*range(8)]]
    assert passes([]) == []


def test_examples_of_mixed_lengths_give_the_loss_and_gradient_of_each_alone(
    base: BaseModel, pool: list[OpenAdapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    uneven = [dataclasses.replace(e, prompt=e.prompt * (1 + i % 3)) for i, e in enumerate(examples(20))]
    recipe = Recipe(steps=1, batch=16, lr=1e-2)
    monkeypatch.setattr("lora_cli.steps.train.descent._PADDING_PER_PASS", 10)
    learnt = fit(base, pool, uneven, Fitting(recipe=recipe)).learnt
    training, validation = split(uneven, seed=0)
    # All sixteen are the only batch: Σ of losses over Σ of tokens, and a validation loss per example.
    mixture = Mixture(base, pool, adaptive(2).parameters)
    with mixture.applied(base):
        losses = [base.completion_losses([base.encode(one)]).sum() for one in training]
        total = torch.stack(losses).sum() / sum(base.encode(one).tokens for one in training)
        total.backward()  # type: ignore[no-untyped-call]
    assert mixture.theta.grad is not None
    [step] = learnt.trace
    assert step.loss == pytest.approx(float(total.detach()), rel=1e-6)
    assert step.gradient == pytest.approx(float(mixture.theta.grad.norm()), rel=1e-5)
    assert step.tokens == sum(len(base.encode(one).ids) for one in training)
    assert list(learnt.each_before) == pytest.approx([-one for one in base.log_likelihoods(validation)], rel=1e-6)


@pytest.mark.parametrize("preset", ["adaptive", "paper-2602.12323"])
def test_a_step_reads_no_example_twice(base: BaseModel, pool: list[OpenAdapter], preset: str) -> None:
    five = examples(5)
    shape = Shape(preset=preset, l1=0.1, init="sqrt")
    of_eight, of_four = (
        fit(base, pool, five, Fitting(shape=shape, recipe=replace(SHORT, batch=batch))).learnt for batch in (8, 4)
    )
    training, _ = split(five, seed=0)
    assert {step.tokens for step in of_eight.trace} == {sum(len(base.encode(one).ids) for one in training)}
    assert of_eight == of_four


def test_the_trace_has_a_line_per_step_and_hides_no_step(
    base: BaseModel, pool: list[OpenAdapter], tmp_path: Path
) -> None:
    learnt = fit(base, pool, examples(20), Fitting(recipe=SHORT)).learnt
    write_trace(learnt, tmp_path)
    first, *rows = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    assert first == {"step": 0, "validation_loss": learnt.loss_before}
    assert [row["step"] for row in rows] == [*range(1, 13)]
    assert [row["lr"] for row in rows] == [SHORT.rate(step) for step in range(12)]
    assert {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row} == {
        point.step: point.validation for point in learnt.curve[1:]
    }
    assert [point.step for point in learnt.curve] == [0, 5, 10, 12]
    assert learnt.curve[1].training == pytest.approx(math.fsum(row["training_loss"] for row in rows[:5]) / 5)
    assert all(row["gradient_norm"] > 0 and row["tokens"] > 0 for row in rows)


def test_a_training_that_stops_at_every_step_ends_as_one_that_never_stops(
    base: BaseModel, pool: list[OpenAdapter], tmp_path: Path
) -> None:
    whole = fit(base, pool, examples(20), Fitting(recipe=SHORT))
    hurried, state = Fitting(recipe=SHORT, deadline=0.0), tmp_path / "fit.npz"
    for step in range(1, 13):
        part = fit(base, pool, examples(20), hurried, checkpoint=state)
        learnt = part.learnt
        assert (len(learnt.trace), learnt.finished) == (step, step == 12)
        assert learnt.trace == whole.learnt.trace[:step]
        assert learnt.curve == tuple(point for point in whole.learnt.curve if point.step <= step)
        assert learnt.loss_after == min(point.validation for point in learnt.curve)
    assert learnt == whole.learnt
    assert part.coefficients == whole.coefficients


def test_what_no_pass_has_used_yet_is_kept_with_the_state(
    base: BaseModel, pool: list[OpenAdapter], tmp_path: Path
) -> None:
    def trained(checkpoint: Checkpoint | None) -> tuple[bool, torch.Tensor, torch.Tensor]:
        mixture, unused = Mixture(base, pool, adaptive(2).parameters), torch.ones(3, requires_grad=True)
        parts = Parts.of(base.encode_all, examples(10), held=HeldOut(), seed=0)
        with mixture.applied(base):
            learnt = learn(
                base,
                [mixture.theta, unused],
                parts,
                Recipe(steps=4, every=2, lr=5e-2),
                checkpoint=checkpoint,
                progress=lambda done, total: None,
            )
        return learnt.finished, mixture.theta.detach(), unused.detach()

    _, theta, unused = trained(None)
    assert torch.equal(unused, torch.ones(3))
    always_late = Checkpoint(tmp_path / "state.npz", "key", deadline=0.0)
    runs = [trained(always_late) for _ in range(4)]
    assert [finished for finished, *_ in runs] == [False, False, False, True]
    assert torch.equal(runs[-1][1], theta)
    assert torch.equal(runs[-1][2], unused)


@pytest.mark.parametrize("made", [llama, gpt2])
def test_layers_computed_again_give_the_same_bits_and_keep_less(made: Any, tmp_path: Path) -> None:
    base = made()
    adapters = two_adapters(base, tmp_path, fan_in_fan_out=made is gpt2)
    mixture = Mixture(base, adapters, adaptive(2, init="normal").parameters)
    batch = base.encode_all(examples(8))
    found, kept = [], []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[-1] += tensor.nbytes
        return tensor

    def once() -> None:
        mixture.theta.grad = None
        kept.append(0)
        with mixture.applied(base):
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = base.completion_losses(batch).sum()
            loss.backward()  # type: ignore[no-untyped-call]
        assert mixture.theta.grad is not None
        found.append((float(loss.detach()), mixture.theta.grad.tolist()))

    once()
    with recomputed(base.model):
        once()
    once()
    assert found[0] == found[1] == found[2]
    assert 4 * kept[1] < kept[0] == kept[2]


def test_a_fit_and_a_new_lora_with_dropout_are_the_same_with_layers_computed_again(
    base: BaseModel, pool: list[OpenAdapter], tmp_path: Path
) -> None:
    from lora_cli.steps.train.train import train

    results = []
    for name in ("kept", "again"):
        (tmp_path / name).mkdir()
        if name == "again":
            with recomputed(base.model):
                learnt = fit(base, pool, examples(20), Fitting(recipe=SHORT)).learnt
                train(base, examples(20), tmp_path / name, recipe=SHORT)
        else:
            learnt = fit(base, pool, examples(20), Fitting(recipe=SHORT)).learnt
            train(base, examples(20), tmp_path / name, recipe=SHORT)
        results.append((learnt, (tmp_path / name / "adapter_model.safetensors").read_bytes()))
    assert results[0] == results[1]


def test_a_model_without_layers_cannot_compute_them_again() -> None:
    with pytest.raises(Refused, match="Linear has no numbered layers"), recomputed(torch.nn.Linear(2, 2)):
        pass


def test_a_new_lora_resumes_to_the_same_bits(base: BaseModel, tmp_path: Path) -> None:
    from lora_cli.steps.train.descent import Checkpoint
    from lora_cli.steps.train.train import train

    def trained(name: str, checkpoint: Checkpoint | None = None) -> bytes:
        (tmp_path / name).mkdir()
        train(base, examples(20), tmp_path / name, recipe=replace(SHORT, steps=3), checkpoint=checkpoint)
        return (tmp_path / name / "adapter_model.safetensors").read_bytes()

    hurried = Checkpoint(tmp_path / "state.npz", "key", deadline=0.0)
    assert [trained(f"part{i}", hurried) for i in range(3)][-1] == trained("whole")


def test_examples_of_one_length_are_one_pass(base: BaseModel) -> None:
    same = [Example(id=str(i), prompt="abc", completion="d") for i in range(5)]
    assert len(passes([len(item.ids) for item in base.encode_all(same)])) == 1
