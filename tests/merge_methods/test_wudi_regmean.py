"""WUDI and RegMean: what they minimise, where that is the sum or the average, and where it would break."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_cli.algebra.lowrank import LowRank
from lora_cli.algebra.updates import Updates
from lora_cli.errors import Refused
from tests.merge_methods.test_merge_laws import (
    IN,
    MIXED,
    OUT,
    WEIGHTS,
    expected,
    factors,
    inputs,
    mapped,
    merged,
    same,
    taken,
)


def many(n: int, rank: int) -> Updates:
    return Updates(tuple(factors(rank, 50 + i) for i in range(n)), keys=tuple(range(n)), scales=(1.0,) * n)


def wudi(updates: Updates, weights: Sequence[float] | None = None, **knobs: Any) -> Tensor:
    return merged("wudi", updates, weights or [1.0] * len(updates), **knobs)


def regmean(updates: Updates, weights: Sequence[float] | None = None, **knobs: Any) -> Tensor:
    return merged("regmean", updates, weights or [1.0] * len(updates), **knobs)


def average(updates: Updates, weights: Sequence[float]) -> Tensor:
    return sum(w * u.dense() for w, u in zip(weights, updates, strict=True)) / sum(map(abs, weights))


def test_wudi_acts_on_each_adapters_inputs_as_that_adapter_does() -> None:
    result = wudi(MIXED, WEIGHTS, ridge=1e-12)
    for w, u in zip(WEIGHTS, MIXED, strict=True):
        residual = (result - w * u.dense()) @ u.dense().T
        assert float(residual.norm()) < 1e-6 * float(u.norm()) ** 2


@pytest.mark.parametrize("ridge", [1e-6, 1e-3, 1.0])
def test_wudi_takes_more_ranks_than_inputs(ridge: float) -> None:
    crowd = many(9, 4)
    weights = [0.5 + 0.25 * i for i in range(9)]
    same(wudi(crowd, weights, ridge=ridge), expected("wudi", crowd, weights, ridge=ridge), 1e-8)


def test_wudi_is_where_its_objective_is_flat() -> None:
    crowd, weights = many(9, 4), [0.5 + 0.25 * i for i in range(9)]
    x = wudi(crowd, weights).requires_grad_()
    mean = sum(abs(w) * w * u.dense() for w, u in zip(weights, crowd, strict=True)) / sum(weights)
    rho = 1e-4 * sum(w * w for w in weights) / sum(weights)
    terms = [
        w * ((x - w * u.dense()) @ u.dense().T).square().sum() / u.dense().square().sum()
        for w, u in zip(weights, crowd, strict=True)
    ]
    (sum(terms) + rho * (x - mean).square().sum()).backward()
    assert x.grad is not None
    assert float(x.grad.norm()) < 1e-9 * float(sum(terms).detach())


def test_wudi_of_adapters_with_nothing_in_common_is_their_sum() -> None:
    v = torch.linalg.qr(factors(9, 3).A.T)[0]
    apart = [LowRank(factors(3, i).B, v[:, 3 * i : 3 * i + 3].T) for i in range(3)]
    updates = Updates(tuple(apart), keys=(1, 2, 3), scales=(1.0,) * 3)
    same(
        wudi(updates, [1.0, 0.5, -2.0]), sum(w * u.dense() for w, u in zip([1.0, 0.5, -2.0], apart, strict=True)), 1e-3
    )


def test_wudi_stays_bounded_where_inputs_are_nearly_alike() -> None:
    a = factors(3, 1).A
    alike = [LowRank(factors(3, i).B, a + 1e-6 * factors(3, 30 + i).A) for i in range(2)]
    updates = Updates(tuple(alike), keys=(1, 2), scales=(1.0, 1.0))
    largest = max(float(u.norm()) for u in alike)
    assert 0.3 * largest < float(wudi(updates).norm()) < 1.5 * largest
    assert float(wudi(updates, ridge=1e-15).norm()) > 1e3 * largest


def test_wudi_counts_an_update_of_zero_as_absent() -> None:
    zero = LowRank(torch.zeros(OUT, 2, dtype=torch.float64), factors(2, 8).A)
    with_zero = replace(MIXED, items=(*MIXED.items[:3], zero))
    same(wudi(with_zero), wudi(taken(MIXED, [0, 1, 2])))
    assert not wudi(MIXED, [0.0] * 4).any()


def test_wudi_in_single_precision_is_right_to_1e_4() -> None:
    same(wudi(mapped(MIXED, lambda u: u.to(torch.float32))).double(), wudi(MIXED), 1e-4)


@pytest.mark.parametrize("tokens", [1, 4, 5, 40])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9, 0.999])
def test_regmean_inverts_the_same_through_few_tokens_as_through_whole_grams(tokens: int, alpha: float) -> None:
    few = replace(MIXED, inputs=tuple(x[:tokens] for x in MIXED.inputs))
    same(regmean(few, WEIGHTS, alpha=alpha), expected("regmean", few, WEIGHTS, alpha=alpha), 1e-7)


def test_regmean_over_more_inputs_than_one_block() -> None:
    g = torch.Generator().manual_seed(2)
    wide = [
        LowRank(torch.randn(5, 2, generator=g).double(), torch.randn(2, 1100, generator=g).double()) for _ in range(3)
    ]
    samples = tuple(torch.randn(7, 1100, generator=g, dtype=torch.float64) for _ in range(3))
    updates = Updates(tuple(wide), keys=(1, 2, 3), scales=(1.0,) * 3, inputs=samples)
    same(regmean(updates), expected("regmean", updates, [1.0] * 3), 1e-8)


def test_regmean_with_equal_grams_is_the_weighted_average() -> None:
    q = torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(4), dtype=torch.float64))[0]
    equal = replace(MIXED, inputs=(inputs(1), -inputs(1), q @ inputs(1), inputs(1).flip(0)))
    same(regmean(equal, WEIGHTS), average(equal, WEIGHTS))


def test_regmean_has_the_least_output_error() -> None:
    def error(x: Tensor) -> float:
        pairs = zip(MIXED, MIXED.inputs, strict=True)
        return sum(float((sample @ (x - u.dense()).T).square().sum()) for u, sample in pairs)

    best = regmean(MIXED, alpha=1 - 1e-9)
    g = torch.Generator().manual_seed(1)
    around = [best + 1e-3 * torch.randn(OUT, IN, generator=g, dtype=torch.float64) for _ in range(20)]
    assert error(best) < min(map(error, around))
    assert error(best) < error(regmean(MIXED)) < error(average(MIXED, [1.0] * 4))


def test_regmean_counts_a_weight_as_so_much_data() -> None:
    twice = replace(taken(MIXED, [0, 1, 1]), inputs=tuple(MIXED.inputs[i] for i in (0, 1, 1)))
    same(regmean(taken(MIXED, [0, 1]), [1.0, 2.0]), regmean(twice))
    turned = mapped(taken(MIXED, [1]), lambda u: u.scaled(-1.0))
    negated = replace(taken(MIXED, [0, 1]), items=(MIXED[0], turned[0]))
    same(regmean(taken(MIXED, [0, 1]), [1.0, -2.0]), regmean(negated, [1.0, 2.0]))


def test_regmean_averages_features_that_no_input_moves() -> None:
    still = torch.ones(IN, dtype=torch.float64)
    still[5:8] = 0
    quiet = replace(MIXED, inputs=tuple(x * still for x in MIXED.inputs))
    same(regmean(quiet, WEIGHTS)[:, 5:8], average(MIXED, WEIGHTS)[:, 5:8], 1e-6)
    silent = replace(MIXED, inputs=tuple(0 * x for x in MIXED.inputs))
    same(regmean(silent, WEIGHTS), average(MIXED, WEIGHTS))


def test_regmean_takes_samples_of_any_precision() -> None:
    coarse = replace(MIXED, inputs=tuple(x.bfloat16() for x in MIXED.inputs))
    rounded = replace(MIXED, inputs=tuple(x.double() for x in coarse.inputs))
    same(regmean(coarse), regmean(rounded), 1e-9)


def test_regmean_refuses_weights_that_are_all_zero() -> None:
    with pytest.raises(Refused, match="all zero"):
        regmean(MIXED, [0.0] * 4)
