"""The laws of the folder of presets: each equals a plain fit that shares no code, and its gradient is right."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lora_cli.algebra.lowrank import LowRank
from lora_cli.errors import UsageError
from lora_cli.fit_methods import Learning
from lora_cli.formats.reader import OpenAdapter
from lora_cli.metrics import METRICS
from lora_cli.models.base_model import BaseModel
from lora_cli.models.mixture import Mixture
from lora_cli.recipes import FIT_METHODS, Recipe, Shape
from lora_cli.records import Coefficients
from lora_cli.steps.fit.fit import FitResult, Fitting, fit, goal_of
from lora_cli.steps.fit.objective import ByLikelihood
from lora_cli.steps.fit.search import costs
from lora_cli.task import split
from tests import dense_fit
from tests.adapters_on_disk import random_factors, write_adapter
from tests.tiny_bases import characters, examples, opened, tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")
LAYER = "model.layers.1"
SHAPES = {
    f"{LAYER}.self_attn.q_proj": (32, 32),
    f"{LAYER}.self_attn.k_proj": (16, 32),
    f"{LAYER}.mlp.down_proj": (32, 48),
}
POOL: Sequence[tuple[tuple[str, ...], int, float]] = (
    (tuple(SHAPES), 3, 6.0),
    (tuple(SHAPES)[:1], 1, 0.5),
    (tuple(SHAPES)[::2], 2, 3.0),
)
TASK = examples(10)
RECIPE = Recipe(steps=20, every=5, batch=8)


class Law(NamedTuple):
    """A preset by hand: the settings of a plain fit, its learning rate, and knobs other than the preset's own."""

    plain: dict[str, Any]
    knobs: Mapping[str, Any] = MappingProxyType({})
    lr: float = 0.05
    last: bool = False
    factors: bool = False


ROOT3 = 3**-0.5
GRADIENT = {
    "adaptive": [
        Law({"phi": "leaky_relu", "start": 0.0}),
        Law({"phi": "softmax", "start": 0.0, "l1": 0.02}, {"activation": "softmax", "l1": 0.02}),
        Law({"phi": "leaky_relu", "start": 0.0}, {"checkpoint": "last"}, last=True),
    ],
    "paper-2602.12323": [
        Law({"phi": "leaky_relu", "start": 0.0, "absent": True}, last=True),
        # A batch of 8: the weight counts eightfold.
        Law(
            {"phi": "softmax", "start": ROOT3, "absent": True, "l1": 0.08},
            {"activation": "softmax", "init": "sqrt", "l1": 0.01},
            last=True,
        ),
    ],
    "adamerging": [
        Law({"phi": "linear", "start": ROOT3}),
        Law({"phi": "linear", "start": ROOT3, "entropy": True}, {"objective": "entropy"}),
    ],
    "cat": [Law({"phi": "linear", "start": 1 / 3})],
    "pi-tuning": [
        Law({"phi": "softmax", "start": 0.0}, {"redraw": "none"}, lr=1e-4, factors=True),
        Law({"phi": "softmax", "start": 0.0}, {"redraw": "none"}, lr=1e-2, factors=True),
    ],
}
CASES = [(preset, law) for preset, laws in GRADIENT.items() for law in laws]


@pytest.fixture(scope="module")
def base() -> BaseModel:
    model = tiny_llama().double()
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            # Its own forward goes through float32, which hides small differences.
            module.forward = functools.partial(rms_norm, module)
    return BaseModel("acme/tiny", model, characters())


def rms_norm(module: Any, x: Tensor) -> Tensor:
    normed: Tensor = module.weight * x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + module.variance_epsilon)
    return normed


@pytest.fixture(scope="module")
def raw() -> list[dict[str, tuple[Tensor, Tensor]]]:
    made = [random_factors({m: SHAPES[m] for m in modules}, rank, seed=i) for i, (modules, rank, _) in enumerate(POOL)]
    return [{module: (0.3 * b, a) for module, (b, a) in factors.items()} for factors in made]


@pytest.fixture(scope="module")
def pool(raw: list[Any], tmp_path_factory: pytest.TempPathFactory) -> list[OpenAdapter]:
    root = tmp_path_factory.mktemp("pool")
    return [
        opened(write_adapter(root / f"adapter{i}", factors, lora_alpha=alpha))
        for i, (factors, (_, _, alpha)) in enumerate(zip(raw, POOL, strict=True))
    ]


def plain(base: BaseModel, raw: list[Any], law: dict[str, Any], modules: Sequence[str] = ()) -> dense_fit.Fit:
    one_each = [
        dense_fit.Plain({m: (b.double(), a.double()) for m, (b, a) in factors.items()}, alpha / rank)
        for factors, (_, rank, alpha) in zip(raw, POOL, strict=True)
    ]
    return dense_fit.Fit(base.model, one_each, modules or tuple(SHAPES), **law)


def lines(base: BaseModel) -> tuple[list[dense_fit.Line], list[dense_fit.Line]]:
    """Training and validation examples as tokens."""
    first, second = (
        [dense_fit.Line(list(one.ids), one.start) for one in base.encode_all(part)] for part in split(TASK)
    )
    return first, second


def test_every_preset_has_a_law() -> None:
    kinds = {name: one.kind for name, one in FIT_METHODS.methods.items()}
    # Those of routers are in tests/algebra/test_routing.py.
    routing = dict.fromkeys(("arrow", "spectr"), "routing")
    assert kinds == {**dict.fromkeys(GRADIENT, "gradient"), "lorahub": "search", **routing}


@pytest.mark.parametrize(("preset", "law"), CASES)
def test_a_preset_equals_a_plain_fit_with_dense_weights(
    base: BaseModel, pool: list[OpenAdapter], raw: list[Any], preset: str, law: Law
) -> None:
    recipe = Recipe(steps=20, every=5, batch=8, lr=None if law.lr == FIT_METHODS.get(preset).lr else law.lr)
    found = fit(base, pool, TASK, Fitting(shape=Shape(preset=preset, **law.knobs), recipe=recipe))
    reference = plain(base, raw, law.plain)
    learnt = [theta for module in SHAPES for theta in reference.theta[module]]
    if law.factors:
        learnt += [
            factor.requires_grad_() for one in reference.pool for pair in one.factors.values() for factor in pair
        ]
    points = dense_fit.descend(reference, learnt, *lines(base), lr=law.lr, steps=20, every=5, last=law.last)
    assert [point.step for point in found.learnt.curve] == [step for step, _ in points]
    assert [point.validation for point in found.learnt.curve] == pytest.approx([loss for _, loss in points], abs=1e-4)
    moved = max(abs(loss - points[0][1]) for _, loss in points)
    assert moved > 1e-3 or law.lr < 0.01
    updates = reference.dense()
    for module in SHAPES:
        values = found.coefficients.values[module]
        expected = [
            float(reference.c(module, i).detach()) if module in one.factors else 0.0
            for i, one in enumerate(reference.pool)
        ]
        assert [own[0] for own in values] == pytest.approx(expected, abs=1e-4)
        assert torch.allclose(found.updates[module].to(torch.float64).dense(), updates[module].detach(), atol=1e-4)


@pytest.mark.parametrize(("preset", "law"), CASES)
def test_the_gradient_equals_finite_differences(
    base: BaseModel, pool: list[OpenAdapter], preset: str, law: Law
) -> None:
    shape = Shape(preset=preset, **law.knobs)
    learning: Learning = FIT_METHODS.load(preset)(len(pool), **shape.knobs)
    mixture = Mixture(base, pool, learning.parameters)
    start = mixture.theta.detach().double()
    # Away from 0, where the leaky ReLU has a corner.
    mixture.theta = (start + torch.linspace(-0.7, 0.9, len(start))).requires_grad_()
    penalty = goal_of(learning, mixture, RECIPE).penalty
    tokens = torch.tensor([[1, 20, 30, 40, 50, 60], [1, 9, 8, 7, 6, 5]])

    def value() -> Tensor:
        logs = base.model(input_ids=tokens).logits.log_softmax(dim=-1)
        total = -logs[:, :-1].gather(2, tokens[:, 1:, None]).mean()
        return total if penalty is None else total + penalty()

    with mixture.applied(base):
        value().backward()
        for tensor in mixture.learnt[:3]:
            assert tensor.grad is not None
            slopes, values = tensor.grad.flatten(), tensor.detach().view(-1)
            assert slopes.abs().max() > 1e-4
            for place in sorted({0, 1, len(slopes) // 2, len(slopes) - 1}):
                kept, ends = float(values[place]), []
                for step in (1e-5, -1e-5):
                    values[place] = kept + step
                    with torch.no_grad():
                        ends.append(float(value()))
                values[place] = kept
                assert float(slopes[place]) == pytest.approx((ends[0] - ends[1]) / 2e-5, abs=1e-9, rel=1e-6)


def test_the_search_of_lorahub_judges_weights_as_a_plain_loop_does(
    base: BaseModel, pool: list[OpenAdapter], raw: list[Any]
) -> None:
    learning: Learning = FIT_METHODS.load("lorahub")(len(pool))
    mixture = Mixture(base, pool, learning.parameters)
    training = base.encode_all(TASK)
    given = torch.tensor([[0.0, 0.0, 0.0], [1.5, -0.5, 0.2], [-1.0, 1.0, 1.5], [0.3, 0.3, 0.3]])
    assert mixture.tries_together
    with mixture.applied(base):
        objective = ByLikelihood(base, mixture, training, METRICS.get("nll"))
        together = costs(objective.values(given), given, mixture, learning)
        alone = [costs(objective.values(one[None]), one[None], mixture, learning)[0] for one in given]
    reference = plain(base, raw, {"phi": "linear", "start": 0.0})
    every = [dense_fit.Line(list(one.ids), one.start) for one in training]
    expected = [dense_fit.hub_objective(reference, one, every, 0.05) for one in given.tolist()]
    assert together == pytest.approx(expected, abs=1e-5)
    assert alone == pytest.approx(together, abs=1e-6)
    assert max(expected) - min(expected) > 0.01


def hub(base: BaseModel, pool: list[OpenAdapter], *, seed: int = 0, **knobs: Any) -> FitResult:
    return fit(base, pool, TASK, Fitting(shape=Shape(preset="lorahub", **knobs), recipe=Recipe(seed=seed)))


def test_a_search_never_ends_above_its_start_and_follows_its_seed(base: BaseModel, pool: list[OpenAdapter]) -> None:
    one, again, other = hub(base, pool), hub(base, pool), hub(base, pool, seed=1)
    assert (one.learnt, one.coefficients) == (again.learnt, again.coefficients)
    assert one.learnt != other.learnt
    lowest = [point.training for point in one.learnt.curve[1:] if point.training is not None]
    assert lowest == sorted(lowest, reverse=True)
    assert one.learnt.curve[-1].step == 40
    assert {abs(c) <= 1.5 for values in one.coefficients.values.values() for own in values for c in own} == {True}
    training, _ = split(TASK)
    assert lowest[-1] < -sum(base.log_likelihoods(training)) / len(training)


def test_a_search_of_few_evaluations_stops_at_them(base: BaseModel, pool: list[OpenAdapter]) -> None:
    assert [point.step for point in hub(base, pool, evaluations=10).learnt.curve] == [0, 8, 10]
    alone = hub(base, pool, evaluations=1)
    assert [point.step for point in alone.learnt.curve] == [0]
    assert {c for values in alone.coefficients.values.values() for own in values for c in own} == {0.0}


def test_the_target_of_pi_tuning_starts_anew_unless_told_not_to(base: BaseModel, pool: list[OpenAdapter]) -> None:
    def factors(kept: int, **knobs: str) -> list[dict[str, LowRank]]:
        learning: Learning = FIT_METHODS.load("pi-tuning")(len(pool), **knobs)
        return Mixture(base, pool, learning.parameters, kept=kept).factors()

    for module in SHAPES:
        own = pool[0].read(module)
        drawn, kept, without = factors(1)[0][module], factors(1, redraw="none")[0][module], factors(0)[0][module]
        assert not drawn.B.any()
        assert 0.008 < float(drawn.A.std()) < 0.012
        assert all(
            torch.allclose(one.B, own.B.double()) and torch.equal(one.A, own.A.double()) for one in (kept, without)
        )
    assert torch.equal(factors(1)[2][next(iter(SHAPES))].A, pool[2].read(next(iter(SHAPES))).A.double())


def test_a_killed_pi_tuning_resumes_to_the_same_bits(base: BaseModel, pool: list[OpenAdapter], tmp_path: Path) -> None:
    def kill(what: str, done: int, total: int) -> None:
        if done == 4:
            raise InterruptedError

    how = Fitting(shape=Shape(preset="pi-tuning"), recipe=Recipe(steps=6, every=2, lr=1e-2), target=pool[0].ref.pinned)
    whole = fit(base, pool, TASK, how)
    with pytest.raises(InterruptedError):
        fit(base, pool, TASK, how, checkpoint=tmp_path / "state", progress=kill)
    resumed = fit(base, pool, TASK, how, checkpoint=tmp_path / "state")
    assert (resumed.coefficients, resumed.learnt) == (whole.coefficients, whole.learnt)
    for one, other in zip(resumed.trained, whole.trained, strict=True):
        assert all(torch.equal(one[module].B, other[module].B) for module in one)
    assert whole.learnt.loss_after < whole.learnt.loss_before


def test_weights_are_tried_one_by_one_where_rows_of_a_pass_may_move(base: BaseModel, pool: list[OpenAdapter]) -> None:
    together = hub(base, pool, evaluations=20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Mixture, "tries_together", property(lambda self: False, lambda self, value: None), raising=False)
        alone = hub(base, pool, evaluations=20)
    assert [point.validation for point in alone.learnt.curve] == pytest.approx(
        [point.validation for point in together.learnt.curve], abs=1e-4
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"preset": "lorahub", "granularity": "layer"}, "preset lorahub takes no --granularity"),
        ({"preset": "cat", "l1": 0.1}, "preset cat takes no --l1"),
        ({"preset": "lorahub", "evaluations": 0}, "--evaluations 0 is out of range"),
        ({"preset": "adamerging", "granularity": "rank"}, "--granularity is one of adapter, layer, sublayer, module"),
        ({"preset": "paper-2602.12323", "granularity": "rank", "activation": "softmax"}, "softmax compares adapters"),
    ],
)
def test_a_knob_that_a_preset_lacks_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Shape(**options)


@pytest.mark.parametrize("recipe", [Recipe(steps=50), Recipe(lr=0.1), Recipe(batch=4)])
def test_a_search_takes_no_options_of_a_descent(recipe: Recipe) -> None:
    with pytest.raises(UsageError, match=r"lorahub takes no --(steps|lr|batch): it searches without gradients"):
        Shape(preset="lorahub").completed(recipe)


def test_the_rate_is_the_presets_unless_one_is_given() -> None:
    assert Shape().completed(Recipe()).lr == 0.05
    assert Shape(preset="pi-tuning").completed(Recipe()).lr == 1e-4
    assert Shape(preset="pi-tuning").completed(Recipe(lr=0.1)).lr == 0.1


def test_a_pad_row_does_not_count_in_an_entropy(base: BaseModel) -> None:
    prompts = base.encoder.prompts_of(TASK)
    alone = [float(base.completion_entropies([one])[0]) for one in prompts]
    assert base.completion_entropies(prompts).tolist() == pytest.approx(alone, abs=1e-5)
    longer = [dataclasses.replace(one, prompt=f"{one.prompt}abc") for one in TASK[:3]]
    mixed = [*prompts[:3], *base.encoder.prompts_of(longer)]
    alone = [float(base.completion_entropies([one])[0]) for one in mixed]
    assert base.completion_entropies(mixed).tolist() == pytest.approx(alone, abs=1e-5)
    assert {one.tokens for one in mixed} == {1}


def test_wide_pools_are_tried_as_whole_updates(base: BaseModel, tmp_path: Path) -> None:
    pool = [
        opened(write_adapter(tmp_path / f"wide{i}", {m: (0.1 * b, a) for m, (b, a) in factors.items()}))
        for i, factors in enumerate(random_factors(SHAPES, 14, seed=i) for i in range(3))
    ]
    mixture = Mixture(base, pool, FIT_METHODS.load("lorahub")(3).parameters)
    given = torch.tensor([[0.0, 0.0, 0.0], [1.5, -0.5, 0.2], [-1.0, 1.0, 1.5]])
    with mixture.applied(base):
        objective = ByLikelihood(base, mixture, base.encode_all(TASK), METRICS.get("nll"))
        together = objective.values(given)
        alone = [objective.values(one[None])[0] for one in given]
    assert together == pytest.approx(alone, abs=1e-6)
    assert len({round(value, 3) for value in together}) == 3


def test_the_hash_of_coefficients_for_adapters_as_they_are_names_nothing_new() -> None:
    facts: dict[str, Any] = {
        "adapters": ("a@1",), "values": {"m": ((1.0,),)}, "granularity": "module", "activation": "linear",
        "task_sha256": "", "base": "b",
    }  # fmt: skip
    plain = Coefficients(**facts)
    assert plain.sha256 == hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    assert dataclasses.replace(plain, trained=True).sha256 != plain.sha256
