"""Laws that every merge method keeps, over the folder: a new method is under test before anyone writes its test."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lora_cli.adapters.lowrank import LowRank
from lora_cli.adapters.tiles import DeltaTiles
from lora_cli.steps.merge import METHODS
from tests import dense_reference

OUT, IN = 24, 18


@dataclass(frozen=True)
class Laws:
    """Which laws a method keeps, and with which knobs, where a law holds only for some."""

    identity: dict[str, object] | None
    linear: bool
    normalised: bool


# identity: knobs under which one adapter with weight 1, and the average of copies, come back unchanged.
# linear: equals Σ w ΔW. normalised: a common factor on all weights changes nothing.
LAWS = {
    "linear": Laws(identity={}, linear=True, normalised=False),
    "cat": Laws(identity={}, linear=True, normalised=False),
    "ties": Laws(identity={"density": 1.0}, linear=False, normalised=True),
}


def factors(rank: int, seed: int) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.randn(OUT, rank, generator=g, dtype=torch.float64),
        torch.randn(rank, IN, generator=g, dtype=torch.float64),
    )


def merged(name: str, updates: Sequence[LowRank], weights: Sequence[float], **knobs: object) -> Tensor:
    """The dense result of a method."""
    function, w = METHODS.load(name), torch.tensor(weights, dtype=torch.float64)
    settings = METHODS.check(name, knobs)
    if METHODS.get(name).kind == "elementwise":
        return function(DeltaTiles(updates), w, **settings)
    return function(updates, w, **settings).dense()


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


MIXED = [factors(2, 1), factors(5, 2), factors(3, 3), factors(1, 4)]
WEIGHTS = [0.4, 1.0, 0.25, 2.0]
every_method = pytest.mark.parametrize("name", sorted(METHODS.methods))


def test_every_method_states_its_laws() -> None:
    assert sorted(LAWS) == sorted(METHODS.methods)


@every_method
def test_equals_the_dense_reference_on_mixed_ranks(name: str) -> None:
    reference = getattr(dense_reference, name.replace("-", "_"))
    dense = [u.dense().numpy() for u in MIXED]
    for weights in (WEIGHTS, [1.0] * 4, [0.5, -1.0, 0.0, 1.5]):
        same(merged(name, MIXED, weights), torch.from_numpy(reference(dense, weights)))


@every_method
def test_the_order_of_adapters_does_not_matter(name: str) -> None:
    order = [2, 0, 3, 1]
    same(merged(name, [MIXED[i] for i in order], [WEIGHTS[i] for i in order]), merged(name, MIXED, WEIGHTS))


@every_method
def test_one_adapter_with_weight_one_comes_back(name: str) -> None:
    if (knobs := LAWS[name].identity) is not None:
        same(merged(name, [MIXED[1]], [1.0], **knobs), MIXED[1].dense())


@every_method
def test_the_average_of_copies_is_the_adapter(name: str) -> None:
    if (knobs := LAWS[name].identity) is not None:
        same(merged(name, [MIXED[1]] * 5, [0.2] * 5, **knobs), MIXED[1].dense())


@every_method
@pytest.mark.parametrize("factor", [3.0, -1.0, 1e-4])
def test_a_common_factor_on_all_adapters_comes_out(name: str, factor: float) -> None:
    scaled = [u.scaled(factor) for u in MIXED]
    same(merged(name, scaled, WEIGHTS), factor * merged(name, MIXED, WEIGHTS))


@every_method
def test_only_the_product_of_the_factors_matters(name: str) -> None:
    g = torch.Generator().manual_seed(9)
    turned = []
    for u in MIXED:
        m = torch.randn(u.rank, u.rank, generator=g, dtype=torch.float64) + 3 * torch.eye(u.rank, dtype=torch.float64)
        turned.append(LowRank(u.B @ m, torch.linalg.solve(m, u.A)))
    same(merged(name, turned, WEIGHTS), merged(name, MIXED, WEIGHTS))


@every_method
def test_padding_with_zero_ranks_changes_nothing(name: str) -> None:
    padded = [LowRank(torch.nn.functional.pad(u.B, (0, 2)), torch.nn.functional.pad(u.A, (0, 0, 0, 2))) for u in MIXED]
    same(merged(name, padded, WEIGHTS), merged(name, MIXED, WEIGHTS))


@every_method
def test_weights_act_as_the_method_says(name: str) -> None:
    doubled = merged(name, MIXED, [2 * w for w in WEIGHTS])
    if LAWS[name].normalised:
        same(doubled, merged(name, MIXED, WEIGHTS))
    else:
        same(doubled, 2 * merged(name, MIXED, WEIGHTS))
    if LAWS[name].linear:
        same(merged(name, MIXED, WEIGHTS), sum(w * u.dense() for w, u in zip(WEIGHTS, MIXED, strict=True)))


@every_method
def test_a_weight_of_zero_takes_an_adapter_out(name: str) -> None:
    same(merged(name, MIXED, [1.0, 0.0, 2.0, 1.0]), merged(name, [MIXED[i] for i in (0, 2, 3)], [1.0, 2.0, 1.0]))


@pytest.mark.parametrize("density", [0.05, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("election", ["total", "frequency"])
def test_ties_equals_its_paper_at_every_density(density: float, election: str) -> None:
    dense = [u.dense().numpy() for u in MIXED]
    expected = dense_reference.ties(dense, WEIGHTS, density, election)
    same(merged("ties", MIXED, WEIGHTS, density=density, election=election), torch.from_numpy(expected))


def test_ties_elects_nothing_where_signs_cancel() -> None:
    u = MIXED[0]
    assert not merged("ties", [u, u.scaled(-1.0)], [1.0, 1.0], density=1.0).any()


def test_ties_keeps_all_entries_that_tie_at_the_border() -> None:
    ones = LowRank(torch.ones(OUT, 1, dtype=torch.float64), torch.ones(1, IN, dtype=torch.float64))
    same(merged("ties", [ones], [1.0], density=0.1), torch.ones(OUT, IN, dtype=torch.float64))
