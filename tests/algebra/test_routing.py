"""Routers equal a dense float64 reference token by token, and obey the laws of routing."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_cli.algebra.lowrank import LowRank
from lora_cli.algebra.routing import Experts, Routing
from lora_cli.recipes import FIT_METHODS

PRESETS = [name for name, one in FIT_METHODS.methods.items() if one.kind == "routing"]
OUT, IN, TOKENS = 12, 20, 9
Array = NDArray[np.float64]


def updates(*ranks: int, seed: int = 0) -> list[LowRank]:
    generator = torch.Generator().manual_seed(seed)
    return [
        LowRank(
            torch.randn(OUT, rank, generator=generator, dtype=torch.float64),
            torch.randn(rank, IN, generator=generator, dtype=torch.float64),
        )
        for rank in ranks
    ]


def tokens(seed: int = 7) -> Tensor:
    return torch.randn(TOKENS, IN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def routed(preset: str, found: list[LowRank], x: Tensor, *, temperature: float = 1.0, top_k: int = 0) -> Tensor:
    routing: Routing = FIT_METHODS.load(preset)(len(found), temperature=temperature, top_k=top_k)
    experts = Experts.of(found)
    assert experts is not None
    return experts.output(x @ experts.A.T, routing)


def score(preset: str, dense: Array, x: Array) -> float:
    if preset == "arrow":
        return float(abs(np.linalg.svd(dense)[2][0] @ x))
    return float(np.linalg.norm(dense @ x))


def reference(preset: str, found: list[LowRank], x: Tensor, temperature: float, top_k: int) -> Array:
    """Token by token and update by update, with dense updates."""
    dense = [one.dense().numpy() for one in found]
    rows = []
    for token in x.numpy():
        scores = [score(preset, one, token) for one in dense]
        kept = sorted(range(len(dense)), key=lambda place: -scores[place])[: top_k or len(dense)]
        highest = max(scores)
        shares = {place: np.exp((scores[place] - highest) / temperature) for place in kept}
        total = sum(shares.values())
        rows.append(sum(shares[place] / total * (dense[place] @ token) for place in kept))
    return np.array(rows)


def close(one: Tensor, other: Tensor | Array, size: float = 1e-10) -> None:
    np.testing.assert_allclose(one.numpy(), np.asarray(other), rtol=size, atol=size)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.3, 0), (5.0, 2), (1.0, 1), (2.0, 9)])
def test_every_token_has_the_shares_of_the_formula(preset: str, temperature: float, top_k: int) -> None:
    found, x = updates(3, 1, 4, 15), tokens()
    close(
        routed(preset, found, x, temperature=temperature, top_k=top_k),
        reference(preset, found, x, temperature, top_k),
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_one_adapter_and_copies_of_it_are_that_adapter(preset: str) -> None:
    [one], x = updates(3), tokens()
    close(routed(preset, [one], x), x @ one.dense().T)
    close(routed(preset, [one] * 4, x), x @ one.dense().T)
    close(routed(preset, [one] * 4, x, top_k=2), x @ one.dense().T)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_high_temperature_gives_the_mean_and_a_low_one_the_best(preset: str) -> None:
    found, x = updates(3, 2, 4), tokens()
    mean = sum((one.dense() for one in found[1:]), found[0].dense()) / 3
    close(routed(preset, found, x, temperature=1e9), x @ mean.T, 1e-6)
    close(routed(preset, found, x, temperature=1e-9), routed(preset, found, x, top_k=1))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("top_k", [0, 2])
def test_neither_order_nor_the_choice_of_factors_matters(preset: str, top_k: int) -> None:
    found, x = updates(3, 2, 4), tokens()
    usual = routed(preset, found, x, top_k=top_k)
    close(routed(preset, found[::-1], x, top_k=top_k), usual)
    turned = []
    for place, one in enumerate(found):
        turn = torch.randn(one.rank, one.rank, generator=torch.Generator().manual_seed(place), dtype=torch.float64)
        turned.append(LowRank(one.B @ turn, torch.linalg.solve(turn, one.A)))
    close(routed(preset, turned, x, top_k=top_k), usual)
    padded = [LowRank(torch.cat([one.B, one.B], dim=1), torch.cat([one.A, 0 * one.A])) for one in found]
    close(routed(preset, padded, x, top_k=top_k), usual)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_sign_of_a_token_does_not_choose(preset: str) -> None:
    found, x = updates(3, 2, 4), tokens()
    close(routed(preset, found, -x), -routed(preset, found, x))


@pytest.mark.parametrize("preset", PRESETS)
def test_an_update_of_zeros_has_no_share(preset: str) -> None:
    found, x = updates(3, 2), tokens()
    still = LowRank(torch.zeros(OUT, 2, dtype=torch.float64), found[1].A)
    close(routed(preset, [found[0], still, found[1]], x), routed(preset, found, x))
    assert Experts.of([still, still]) is None


def test_the_scale_of_an_adapter_counts_for_spectr_alone() -> None:
    found, x = updates(3, 3), tokens()
    louder = [found[0].scaled(4.0), found[1]]

    def shares(preset: str, of: list[LowRank]) -> Tensor:
        experts = Experts.of(of)
        assert experts is not None
        routing: Routing = FIT_METHODS.load(preset)(2)
        return routing.shares(experts, x @ experts.A.T)

    close(shares("arrow", louder), shares("arrow", found))
    assert (shares("spectr", louder)[:, 0] > shares("spectr", found)[:, 0] + 0.01).any()


@pytest.mark.parametrize("preset", PRESETS)
def test_in_half_precision_shares_are_of_single_precision(preset: str) -> None:
    found, x = updates(3, 2, 4), tokens()
    experts = Experts.of(found)
    assert experts is not None
    routing: Routing = FIT_METHODS.load(preset)(3)
    low = experts.to(torch.device("cpu"), torch.bfloat16)
    shares = routing.shares(low, (x.bfloat16() @ low.A.T).to(low.s.dtype))
    assert shares.dtype == torch.float32
    close(shares.sum(dim=1), torch.ones(TOKENS), 1e-6)
    output = low.output(x.bfloat16() @ low.A.T, routing)
    assert output.dtype == torch.bfloat16
    usual = routed(preset, found, x)
    assert (output.double() - usual).norm() < 0.05 * usual.norm()
