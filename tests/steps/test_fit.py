import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from lora_cli.errors import DataError, NothingMatched, OutputError, Refused, UsageError
from lora_cli.formats.reader import OpenAdapter
from lora_cli.models.base_model import BaseModel
from lora_cli.recipes import Recipe, Shape, TrainOptions
from lora_cli.records import Example
from lora_cli.steps.fit.fit import FitResult, Fitting, fit
from lora_cli.steps.train.train import train
from tests.adapters_on_disk import random_factors, write_adapter
from tests.tiny_bases import STORIES, examples, llama, needs_stories, opened

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = Recipe(steps=20, every=5, lr=5e-2)


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return llama()


@pytest.fixture(scope="module")
def relevant(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> OpenAdapter:
    """A LoRA that was trained on the very task."""
    folder = tmp_path_factory.mktemp("relevant")
    result = train(
        base, examples(64), folder, options=TrainOptions(rank=4, alpha=8, dropout=0.0), recipe=Recipe(steps=80, lr=1e-2)
    )
    assert result.learnt.loss_after < 0.5 * result.learnt.loss_before
    return opened(folder, "acme/relevant")


@pytest.fixture(scope="module")
def pool(base: BaseModel, relevant: OpenAdapter, tmp_path_factory: pytest.TempPathFactory) -> list[OpenAdapter]:
    shapes = {module: base.shapes[module] for module in relevant.modules}
    noise = []
    for seed in range(3):
        factors = random_factors(shapes, 2 + seed, seed=seed)
        small = {module: (0.2 * b, a) for module, (b, a) in factors.items()}
        noise.append(
            opened(write_adapter(tmp_path_factory.mktemp("pool") / f"noise{seed}", small), f"acme/noise{seed}")
        )
    return [noise[0], relevant, *noise[1:]]


def same(one: FitResult, other: FitResult) -> bool:
    return one.coefficients == other.coefficients and one.learnt == other.learnt


def test_the_learning_rate_warms_up_and_falls_as_half_a_cosine() -> None:
    recipe = Recipe(steps=100, lr=1.0)
    assert [recipe.rate(step) for step in (0, 4, 9)] == pytest.approx([0.0, 0.4, 0.9])
    assert [recipe.rate(step) for step in (10, 55, 99)] == pytest.approx(
        [1.0, 0.5, 0.5 * (1 + math.cos(math.pi * 89 / 90))]
    )


@pytest.mark.parametrize(
    "setting", [{"steps": 0}, {"batch": 0}, {"every": 0}, {"lr": 0.0}, {"lr": math.nan}, {"seed": -1}]
)
def test_a_recipe_that_cannot_be_followed(setting: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=f"--{next(iter(setting))}"):
        replace(Recipe(), **setting)


@pytest.mark.slow
def test_fit_finds_the_adapter_that_helps(base: BaseModel, pool: list[OpenAdapter]) -> None:
    result = fit(base, pool, examples(50), Fitting(recipe=Recipe(steps=60), task_sha256="ab" * 32))
    assert (result.n_train, result.n_validation) == (40, 10)
    assert result.learnt.loss_after < 0.7 * result.learnt.loss_before
    coefficients = result.coefficients
    assert coefficients.adapters == tuple(adapter.ref.pinned for adapter in pool)
    assert (coefficients.base, coefficients.task_sha256) == ("acme/tiny", "ab" * 32)
    means = [
        sum(values[place][0] for values in coefficients.values.values()) / len(coefficients.values)
        for place in range(len(pool))
    ]
    assert max(range(len(pool)), key=means.__getitem__) == 1


def test_the_coefficients_are_those_of_the_best_step(base: BaseModel, pool: list[OpenAdapter]) -> None:
    result = fit(base, pool, examples(20), Fitting(recipe=SHORT))
    curve = result.learnt.curve
    assert [point.step for point in curve] == [0, 5, 10, 15, 20]
    assert curve[0].training is None
    assert curve[0].validation == result.learnt.loss_before
    best = min(curve, key=lambda point: point.validation)
    assert (result.learnt.best_step, result.learnt.loss_after) == (best.step, best.validation)
    updates = {}
    for module, values in result.coefficients.values.items():
        parts = [(adapter.read(module), c) for adapter, (c,) in zip(pool, values, strict=True)]
        updates[module] = type(parts[0][0])(
            torch.cat([part.B * c for part, c in parts], dim=1), torch.cat([part.A for part, _ in parts])
        )
    from lora_cli.task import split

    _, validation = split(examples(20), seed=0)
    with base.applied(updates):
        each = [-value for value in base.log_likelihoods(validation)]
    assert each == pytest.approx(result.learnt.each_after, rel=1e-4)


def test_a_loss_is_the_mean_over_the_examples_that_its_interval_is_about(
    base: BaseModel, pool: list[OpenAdapter]
) -> None:
    uneven = [dataclasses.replace(e, completion=e.completion * (1 + i % 4)) for i, e in enumerate(examples(20))]
    learnt = fit(base, pool, uneven, Fitting(recipe=SHORT)).learnt
    assert learnt.loss_after == pytest.approx(sum(learnt.each_after) / len(learnt.each_after), rel=1e-9)
    assert learnt.loss_before == pytest.approx(sum(learnt.each_before) / len(learnt.each_before), rel=1e-9)


def test_a_fit_that_helps_nothing_keeps_the_base(pool: list[OpenAdapter], relevant: OpenAdapter) -> None:
    able = llama()
    for module in relevant.modules:
        able.model.get_submodule(module).weight += relevant.read(module).dense()
    noise = [adapter for adapter in pool if adapter is not relevant]
    result = fit(able, noise, examples(50), Fitting(recipe=replace(SHORT, lr=50.0)))
    assert result.learnt.best_step == 0
    assert result.learnt.loss_after == result.learnt.loss_before
    assert {c for values in result.coefficients.values.values() for own in values for c in own} == {0.0}


def test_fit_is_a_function_of_its_seed(base: BaseModel, pool: list[OpenAdapter]) -> None:
    one, again, other = (fit(base, pool, examples(20), Fitting(recipe=replace(SHORT, seed=seed))) for seed in (0, 0, 1))
    assert same(one, again)
    assert not same(one, other)


def test_small_passes_give_the_same_gradient_as_one(
    base: BaseModel, pool: list[OpenAdapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fit(base, pool, examples(20), Fitting(recipe=SHORT))
    monkeypatch.setattr("lora_cli.steps.train.descent.TOKENS_PER_PASS", 40)
    parts = fit(base, pool, examples(20), Fitting(recipe=SHORT))
    assert parts.learnt.loss_after == pytest.approx(whole.learnt.loss_after, rel=1e-3)


def test_l1_pulls_coefficients_towards_zero(base: BaseModel, pool: list[OpenAdapter]) -> None:
    def size(l1: float) -> float:
        values = fit(base, pool, examples(50), Fitting(shape=Shape(l1=l1), recipe=Recipe(steps=40))).coefficients.values
        return sum(abs(c) for per_adapter in values.values() for own in per_adapter for c in own)

    assert size(50.0) < 0.1 * size(0.0)


def test_the_control_has_nothing_to_learn_from(base: BaseModel, pool: list[OpenAdapter]) -> None:
    real = fit(base, pool, examples(50), Fitting(recipe=Recipe(steps=60)))
    control = fit(base, pool, examples(50), Fitting(recipe=Recipe(steps=60)), reinit=True)
    assert control.learnt.loss_before == real.learnt.loss_before
    assert control.learnt.loss_after > 1.3 * real.learnt.loss_after


def test_a_target_joins_in_front_and_the_control_leaves_it_alone(
    base: BaseModel, pool: list[OpenAdapter], relevant: OpenAdapter
) -> None:
    noise = [adapter for adapter in pool if adapter is not relevant]
    result = fit(
        base,
        [*noise, relevant],
        examples(50),
        Fitting(recipe=Recipe(steps=60), target=relevant.ref.pinned),
        reinit=True,
    )
    assert result.coefficients.adapters[0] == relevant.ref.pinned
    assert result.learnt.loss_after < 0.7 * result.learnt.loss_before


def test_what_cannot_be_fitted_is_said(base: BaseModel, pool: list[OpenAdapter]) -> None:
    with pytest.raises(NothingMatched, match="no adapters"):
        fit(base, [], examples(5))
    with pytest.raises(DataError, match="cannot be split"):
        fit(base, pool, examples(1))
    with pytest.raises(DataError, match="1 of 6 examples has more: long"):
        fit(base, pool, [*examples(5), Example(id="long", prompt="x" * 80, completion="y")])
    for l1 in (-1.0, math.nan, math.inf):
        with pytest.raises(UsageError, match="--l1"):
            Shape(l1=l1)


def test_a_loss_that_is_not_finite_is_refused(base: BaseModel, tmp_path: Path) -> None:
    attention = {name: shape for name, shape in base.shapes.items() if name.endswith(("q_proj", "k_proj"))}
    factors = {name: (b * 1e14, a * 1e14) for name, (b, a) in random_factors(attention, 2, seed=0).items()}
    huge = opened(write_adapter(tmp_path / "huge", factors))
    with pytest.raises(Refused, match=r"the loss is (nan|inf) at step \d"):
        fit(base, [huge], examples(20), Fitting(shape=Shape(activation="linear", init="average"), recipe=SHORT))


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [1, 7, 15, 19])
def test_a_killed_fit_resumes_to_the_same_bits(
    base: BaseModel, pool: list[OpenAdapter], tmp_path: Path, at: int
) -> None:
    def kill(what: str, done: int, total: int) -> None:
        if done == at:
            raise Killed

    state = tmp_path / "states" / "fit.state"
    whole = fit(base, pool, examples(20), Fitting(recipe=SHORT))
    with pytest.raises(Killed):
        fit(base, pool, examples(20), Fitting(recipe=SHORT), checkpoint=state, progress=kill)
    seen: list[int] = []
    resumed = fit(
        base,
        pool,
        examples(20),
        Fitting(recipe=SHORT),
        checkpoint=state,
        progress=lambda what, done, total: seen.append(done),
    )
    assert same(resumed, whole)
    assert seen[0] == at // 5 * 5
    assert [file.name for file in state.parent.iterdir()] == ["fit.state"]


def test_a_state_of_another_fit_or_a_broken_one_is_not_taken_up(
    base: BaseModel, pool: list[OpenAdapter], tmp_path: Path
) -> None:
    state = tmp_path / "fit.state"
    fit(base, pool, examples(20), Fitting(recipe=replace(SHORT, seed=9)), checkpoint=state)
    expected = fit(base, pool, examples(20), Fitting(recipe=SHORT))
    assert same(fit(base, pool, examples(20), Fitting(recipe=SHORT), checkpoint=state), expected)
    with np.load(state) as file:
        assert len(json.loads(str(file["notes"]))["trace"]) == 20
    state.write_bytes(b"broken")
    assert same(fit(base, pool, examples(20), Fitting(recipe=SHORT), checkpoint=state), expected)


def test_a_state_that_cannot_be_written(base: BaseModel, pool: list[OpenAdapter], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        fit(base, pool, examples(20), Fitting(recipe=SHORT), checkpoint=tmp_path / "file" / "fit.state")


def test_training_repeats_to_the_bit_with_dropout(base: BaseModel, tmp_path: Path) -> None:
    results = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        results.append(train(base, examples(20), tmp_path / name, options=TrainOptions(rank=2), recipe=SHORT))
    assert results[0] == results[1]
    one, two = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (2, 16.0, 0.1)
    assert results[0].parameters == sum(
        2 * (out + inn) for name, (out, inn) in base.shapes.items() if "lm_head" not in name
    )


def test_a_trained_adapter_holds_its_best_step(base: BaseModel, relevant: OpenAdapter) -> None:
    wanted = examples(64)
    with base.applied({module: relevant.read(module) for module in relevant.modules}):
        adapted = base.log_likelihoods(wanted)
    bare = base.log_likelihoods(wanted)
    assert sum(adapted) / 64 > 0.5 * sum(bare) / 64


@pytest.mark.parametrize("setting", [{"rank": 0}, {"dropout": 1.0}, {"alpha": 0.0}])
def test_settings_that_make_no_lora_are_refused_before_a_base_is_there(setting: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="a LoRA needs --rank of at least 1"):
        TrainOptions(**setting)  # type: ignore[arg-type]


@pytest.mark.slow
@needs_stories
def test_on_a_real_base_a_fit_finds_the_style_it_was_trained_on(tmp_path: Path) -> None:
    from lora_cli.models.ref import load

    real = load(str(STORIES))
    names = ["Lily", "Tom", "Anna", "Ben", "Mia", "Max", "Sue", "Tim"]
    things = ["ball", "dog", "tree", "boat", "hat", "cake"]

    def task(ending: str, n: int, offset: int = 0) -> list[Example]:
        return [
            Example(
                id=str(i + 1),
                prompt=f"{names[(i + offset) % 8]} had a {things[i % 6]}.",
                completion=f"The {things[i % 6]} was {ending}.",
            )
            for i in range(n)
        ]

    trained = []
    for name, ending in (("red", "red and big"), ("sad", "lost and gone")):
        (tmp_path / name).mkdir()
        recipe = Recipe(steps=40, lr=1e-2, every=10)
        result = train(
            real, task(ending, 40), tmp_path / name, options=TrainOptions(rank=4, alpha=8, dropout=0.0), recipe=recipe
        )
        assert result.learnt.loss_after < 0.5 * result.learnt.loss_before
        trained.append(opened(tmp_path / name))
    result = fit(real, trained, task("lost and gone", 30, offset=3), Fitting(recipe=Recipe(steps=30)))
    assert result.learnt.loss_after < 0.6 * result.learnt.loss_before
    red, sad = (sum(values[place][0] for values in result.coefficients.values.values()) for place in range(2))
    assert sad > red
