from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_cli.errors import Refused, UsageError
from lora_cli.fit_methods.adaptive import adaptive
from lora_cli.formats.reader import OpenAdapter
from lora_cli.models.base_model import BaseModel
from lora_cli.models.mixture import Mixture
from lora_cli.recipes import FIT_METHODS, Shape
from tests.adapters_on_disk import random_factors, write_adapter
from tests.tiny_bases import characters, llama, opened, tiny_llama

Q0, K0, UP0 = (f"model.layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj"))
Q1, DOWN1 = "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"
SHAPES = {Q0: (32, 32), K0: (16, 32), UP0: (48, 32), Q1: (32, 32), DOWN1: (32, 48)}
KNOBS = FIT_METHODS.get("adaptive").knobs
TOKENS = torch.tensor([[1, 20, 30, 40, 50, 60], [1, 9, 8, 7, 6, 5]])

PHI: dict[str, Callable[[Tensor], Tensor]] = {
    "leaky_relu": lambda t: torch.where(t > 0, t, 0.01 * t),
    "linear": lambda t: t,
    "sigmoid": lambda t: 1 / (1 + (-t).exp()),
    "square": lambda t: t * t,
}


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return BaseModel("acme/tiny", tiny_llama().double(), characters())


@pytest.fixture
def adapters(tmp_path: Path) -> list[OpenAdapter]:
    """Three adapters of different ranks, modules and scales."""
    pool = [
        ((Q0, K0, UP0, Q1, DOWN1), 3, {"lora_alpha": 6}),
        ((Q0, Q1), 1, {}),
        ((UP0, DOWN1, Q0), 2, {"lora_alpha": 3, "use_rslora": True}),
    ]
    made = []
    for place, (modules, rank, config) in enumerate(pool):
        factors = random_factors({module: SHAPES[module] for module in modules}, rank, seed=place)
        made.append(opened(write_adapter(tmp_path / f"adapter{place}", factors, **config)))
    return made


def mixed(
    base: BaseModel, adapters: list[OpenAdapter], *, seed: int = 0, reinit: Any = None, kept: int = 0, **knobs: Any
) -> Mixture:
    """The mixture whose parameters the adaptive method chooses."""
    return Mixture(base, adapters, adaptive(len(adapters), **knobs).parameters, seed=seed, reinit=reinit, kept=kept)


def group(module: str, granularity: str) -> Any:
    layer, block = module.split(".")[2], module.split(".")[3]
    return {"adapter": 0, "layer": layer, "sublayer": (layer, block), "module": module, "rank": module}[granularity]


def by_loop(base: BaseModel, adapters: list[OpenAdapter], shape: Shape, thetas: dict[Any, Tensor]) -> Tensor:
    """The model's output with Σ c · B A added to dense float64 weights, one adapter after another."""
    weights = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    for module in SHAPES:
        for place, adapter in enumerate(adapters):
            if module not in adapter.modules:
                continue
            update = adapter.read(module).to(torch.float64)
            key = group(module, shape.granularity)
            if shape.activation == "softmax":
                inside = [i for i, other in enumerate(adapters)
                          if any(group(m, shape.granularity) == key for m in other.modules)]  # fmt: skip
                c = thetas[key, place].exp() / sum(thetas[key, i].exp() for i in inside)
            else:
                c = PHI[shape.activation](thetas[key, place])
            weights[f"{module}.weight"] = weights[f"{module}.weight"] + (update.B * c) @ update.A
    output: Tensor = torch.func.functional_call(base.model, weights, kwargs={"input_ids": TOKENS}).logits
    return output


def loop_thetas(mixture: Mixture, adapters: list[OpenAdapter], granularity: str) -> dict[Any, Tensor]:
    """θ as the loop names it: by (group, adapter), in the mixture's own order."""
    values = iter(mixture.theta.detach().double())
    named: dict[Any, Tensor] = {}
    modules = [module for module in SHAPES if any(module in adapter.modules for adapter in adapters)]
    for module in sorted(modules):
        for place, adapter in enumerate(adapters):
            key = (group(module, granularity), place)
            if granularity == "rank":
                if module in adapter.modules:
                    rank = adapter.modules[module].rank
                    named[key] = torch.stack([next(values) for _ in range(rank)]).requires_grad_()
            elif key not in named:
                named[key] = next(values).clone().requires_grad_()
    return named


COMBINATIONS = [
    (granularity, activation)
    for granularity in KNOBS["granularity"].choices
    for activation in KNOBS["activation"].choices
    if (granularity, activation) != ("rank", "softmax")
]


@pytest.mark.parametrize(("granularity", "activation"), COMBINATIONS)
def test_forward_and_gradient_equal_an_explicit_loop_over_adapters(
    base: BaseModel, adapters: list[OpenAdapter], granularity: Any, activation: Any
) -> None:
    shape = Shape(granularity=granularity, activation=activation, init="normal")
    mixture = mixed(base, adapters, seed=4, **shape.knobs)
    mixture.theta = mixture.theta.detach().double().requires_grad_()
    thetas = loop_thetas(mixture, adapters, granularity)
    expected = by_loop(base, adapters, shape, thetas)
    with mixture.applied(base):
        found = base.model(input_ids=TOKENS).logits
    assert torch.allclose(found, expected, atol=1e-11)
    probe = torch.randn(found.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found.backward(probe)
    expected.backward(probe)
    assert mixture.theta.grad is not None
    by_hand = torch.cat([(torch.zeros_like(t) if t.grad is None else t.grad).flatten() for t in thetas.values()])
    assert by_hand.abs().max() > 1e-3
    assert torch.allclose(mixture.theta.grad, by_hand, atol=1e-11 * float(by_hand.abs().max()))


def test_the_gradient_of_the_input_is_right_too(base: BaseModel, adapters: list[OpenAdapter]) -> None:
    mixture = mixed(base, adapters, seed=1, init="normal")
    embedded = base.model.get_input_embeddings()(TOKENS).detach()
    mine, dense = embedded.clone().requires_grad_(), embedded.clone().requires_grad_()
    with mixture.applied(base):
        base.model(inputs_embeds=mine).logits.sum().backward()
    weights = dict(base.model.state_dict())
    for module, values in mixture.values().items():
        for adapter, (c,) in zip(adapters, values, strict=True):
            if module in adapter.modules:
                update = adapter.read(module).to(torch.float64)
                weights[f"{module}.weight"] = weights[f"{module}.weight"] + c * update.dense()
    torch.func.functional_call(base.model, weights, kwargs={"inputs_embeds": dense}).logits.sum().backward()
    assert mine.grad is not None
    assert dense.grad is not None
    assert torch.allclose(mine.grad, dense.grad, atol=1e-5)


def test_zero_init_starts_at_the_base_and_the_mixture_is_taken_off(
    base: BaseModel, adapters: list[OpenAdapter]
) -> None:
    bare = base.model(input_ids=TOKENS).logits
    mixture = mixed(base, adapters)
    with mixture.applied(base):
        assert torch.equal(base.model(input_ids=TOKENS).logits, bare)
    mixture.theta.data.fill_(1.0)
    assert torch.equal(base.model(input_ids=TOKENS).logits, bare)


@pytest.mark.parametrize(
    ("init", "activation", "value"),
    [
        ("average", "linear", 1 / 3),
        ("sqrt", "linear", 3**-0.5),
        ("sqrt", "square", 1 / 3),
        ("zero", "sigmoid", 0.5),
        ("zero", "linear", 0.0),
    ],
)
def test_each_start_gives_its_coefficients(
    base: BaseModel, adapters: list[OpenAdapter], init: Any, activation: Any, value: float
) -> None:
    values = mixed(base, adapters, init=init, activation=activation).values()
    assert [len(own) for own in values[Q0]] == [1, 1, 1]
    assert [own[0] for own in values[Q0]] == pytest.approx([value] * 3)


@pytest.mark.parametrize("init", ["uniform", "normal"])
def test_random_starts_follow_the_seed(base: BaseModel, adapters: list[OpenAdapter], init: str) -> None:
    shape = {"init": init, "activation": "linear", "granularity": "rank"}
    one, again, other = (mixed(base, adapters, seed=seed, **shape).theta.detach() for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert bool(one.min() >= 0 and one.max() <= 1) == (init == "uniform")


def test_values_name_every_adapter_and_show_an_absent_one(base: BaseModel, adapters: list[OpenAdapter]) -> None:
    values = mixed(base, adapters, init="average", activation="linear").values()
    assert set(values) == set(SHAPES)
    assert values[K0] == ((pytest.approx(1 / 3),), (0.0,), (0.0,))
    per_rank = mixed(base, adapters, init="average", activation="linear", granularity="rank").values()
    assert [len(factors) for factors in per_rank[K0]] == [3, 0, 0]
    assert [len(factors) for factors in per_rank[Q0]] == [3, 1, 2]


def test_softmax_shares_a_module_among_the_adapters_that_have_it(base: BaseModel, adapters: list[OpenAdapter]) -> None:
    values = mixed(base, adapters, activation="softmax").values()
    assert values[K0] == ((1.0,), (0.0,), (0.0,))
    assert [own[0] for own in values[Q1]] == pytest.approx([0.5, 0.5, 0.0])


def test_the_penalty_is_the_mean_over_groups_of_what_is_there(base: BaseModel, adapters: list[OpenAdapter]) -> None:
    mixture = mixed(base, adapters, init="average")
    present = sum(len(adapter.modules) for adapter in adapters)
    assert float(mixture.penalty().detach()) == pytest.approx(present / 3 / len(SHAPES))


@pytest.fixture
def uneven(tmp_path: Path) -> list[OpenAdapter]:
    """Two adapters of one module, with scales of 3 and 0.5 and factors of very different sizes."""
    made = []
    for place, (rank, alpha, size) in enumerate(((24, 72, 1.0), (8, 4, 5.0))):
        factors = random_factors({UP0: (48, 32)}, rank, seed=place + 1)
        grown = {module: (size * b, 0.1 * a) for module, (b, a) in factors.items()}
        made.append(opened(write_adapter(tmp_path / f"uneven{place}", grown, lora_alpha=alpha)))
    return made


def halves(mixture: Mixture, width: int) -> list[tuple[Tensor, Tensor]]:
    """(B, A) of the first `width` ranks of the module, and of the others."""
    block = mixture._blocks[UP0]
    return [(block.b[:, :width], block.a[:width]), (block.b[:, width:], block.a[width:])]


def test_noise_keeps_the_norm_of_each_adapters_own_update(uneven: list[OpenAdapter]) -> None:
    real, drawn, again = (
        halves(mixed(llama(), uneven, seed=3, reinit=reinit), 24) for reinit in (None, "norm", "norm")
    )
    for (b, a), (b_drawn, a_drawn), (b_again, a_again) in zip(real, drawn, again, strict=True):
        assert float((b_drawn.double() @ a_drawn.double()).norm()) == pytest.approx(
            float((b.double() @ a.double()).norm()), rel=1e-5
        )
        assert abs(float(torch.corrcoef(torch.stack([(b @ a).flatten(), (b_drawn @ a_drawn).flatten()]))[0, 1])) < 0.1
        assert torch.equal(b_drawn, b_again)
        assert torch.equal(a_drawn, a_again)


def test_pooled_noise_has_the_spread_of_all_raw_factors_and_each_adapters_own_scale(uneven: list[OpenAdapter]) -> None:
    real = halves(mixed(llama(), uneven), 24)
    raw_b = torch.cat([(real[0][0] / 3).flatten(), (real[1][0] / 0.5).flatten()])
    raw_a = torch.cat([a.flatten() for _, a in real])
    for (b, a), scale in zip(halves(mixed(llama(), uneven, seed=3, reinit="pooled"), 24), (3, 0.5), strict=True):
        assert float(b.std()) == pytest.approx(scale * float(raw_b.std()), rel=0.1)
        assert float(a.std()) == pytest.approx(float(raw_a.std()), rel=0.1)
        assert abs(float(b.mean())) < 0.2 * float(b.std())


@pytest.mark.parametrize("reinit", ["norm", "pooled"])
def test_an_adapter_that_is_kept_stays_and_does_not_set_the_noise_of_the_others(
    uneven: list[OpenAdapter], reinit: str
) -> None:
    (b, a), (b_other, a_other) = halves(mixed(llama(), uneven), 24)
    (b_kept, a_kept), (b_drawn, a_drawn) = halves(mixed(llama(), uneven, seed=3, reinit=reinit, kept=1), 24)
    assert torch.equal(b_kept, b)
    assert torch.equal(a_kept, a)
    norms = [float((one @ other).norm()) for one, other in ((b_other, a_other), (b_drawn, a_drawn))]
    assert norms[1] == pytest.approx(norms[0], rel=1e-5 if reinit == "norm" else 0.2)


@pytest.mark.parametrize("reinit", ["norm", "pooled"])
def test_the_noise_of_an_update_of_zero_is_zero(tmp_path: Path, reinit: str) -> None:
    b, a = random_factors({UP0: (48, 32)}, 2, seed=0)[UP0]
    still = opened(write_adapter(tmp_path / "still", {UP0: (0 * b, a)}))
    mute = opened(write_adapter(tmp_path / "mute", {UP0: (b, a)}, lora_alpha=0))
    for pool in ([still], [mute], [still, mute]):
        block = mixed(llama(), pool, reinit=reinit)._blocks[UP0]
        assert not (block.b @ block.a).any()


def test_factors_are_held_in_the_bases_precision_and_coefficients_in_fp32(adapters: list[OpenAdapter]) -> None:
    base = BaseModel("acme/tiny", tiny_llama().bfloat16(), characters())
    mixture = mixed(base, adapters, init="average")
    assert {block.a.dtype for block in mixture._blocks.values()} == {torch.bfloat16}
    with mixture.applied(base):
        base.model(input_ids=TOKENS).logits.sum().backward()
    assert mixture.theta.dtype == torch.float32
    assert mixture.theta.grad is not None
    assert mixture.theta.grad.abs().sum() > 0


def test_an_adapter_that_does_not_fit_or_overflows_is_refused(tmp_path: Path) -> None:
    other = opened(write_adapter(tmp_path / "other", random_factors({Q0: (32, 48)}, 2, seed=0)), "owner/other")
    with pytest.raises(Refused, match="owner/other does not fit acme/tiny"):
        mixed(llama(), [other])
    b, a = random_factors({Q0: (32, 32)}, 2, seed=0)[Q0]
    huge = opened(write_adapter(tmp_path / "huge", {Q0: (b * 1e6, a)}))
    with pytest.raises(Refused, match="overflow"):
        mixed(BaseModel("acme/tiny", tiny_llama().half(), characters()), [huge])


@pytest.mark.parametrize("name", ["granularity", "activation", "init"])
def test_unknown_words_are_refused_by_name(name: str) -> None:
    with pytest.raises(UsageError, match=f"^{name}: invalid enum value 'nonsense'"):
        Shape.of(**{name: "nonsense"})


def test_softmax_per_rank_is_refused() -> None:
    with pytest.raises(UsageError, match="softmax"):
        Shape(granularity="rank", activation="softmax")
