"""Laws that every merge method keeps, over the folder: a new method is under test before anyone writes its test."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_cli.algebra.lowrank import LowRank
from lora_cli.algebra.updates import Updates
from lora_cli.merge_options import METHODS
from lora_cli.steps.merge.module import run_method
from tests import dense_clusters, dense_coefficients, dense_compat, dense_reference, dense_spectral
from tests.dense_reference import Case

OUT, IN = 24, 18
REFERENCES = (dense_reference, dense_compat, dense_clusters, dense_coefficients, dense_spectral)


@dataclass(frozen=True, kw_only=True)
class Laws:
    """Which laws a method keeps. What a method does not keep, its page in docs/methods.md says.

    knobs: settings under which all laws are tested, where the defaults do not suit 24 × 18 modules.
    identity: knobs under which one adapter with weight 1 comes back unchanged; None: it does not.
    copies: knobs under which copies, at the method's own weights, come back as the adapter; None: they do not.
    doubling: what twice the weights do: "nothing", "doubles" the result, or something "else".
    scale, sign: a common positive factor, or -1, on all adapters comes out.
    gauge: only the products B·A matter.
    padding: ranks of zeros change nothing.
    dropping: an adapter of weight 0 might as well not be there.
    linear: the result is Σ w ΔW.
    takes: how many adapters it merges, where that is not any number.
    equal_ranks: it merges adapters of one rank only.
    tolerance: relative, against the dense reference.
    """

    knobs: dict[str, Any] | None = None
    identity: dict[str, Any] | None = None
    copies: dict[str, Any] | None = None
    doubling: str = "doubles"
    scale: bool = True
    sign: bool = True
    gauge: bool = True
    padding: bool = True
    dropping: bool = True
    linear: bool = False
    takes: int | None = None
    equal_ranks: bool = False
    tolerance: float = 1e-9


LAWS = {
    "breadcrumbs": Laws(identity={"density": 1.0}, copies={"density": 1.0}),
    "cat": Laws(identity={}, copies={}, linear=True),
    "core": Laws(identity={"density": 1.0}, copies={"density": 1.0}, doubling="nothing"),
    "ctm": Laws(
        knobs={"compress_to": 4},
        identity={"compress_to": 5, "density": 1.0},
        copies={"compress_to": 5, "density": 1.0},
        doubling="nothing",
        tolerance=1e-3,
    ),
    "dare": Laws(identity={"density": 1.0}, copies={"density": 1.0}),
    "dare-ties": Laws(identity={"density": 1.0}, copies={"density": 1.0}, doubling="nothing"),
    "della": Laws(
        identity={"density": 1.0, "epsilon": 0.0}, copies={"density": 1.0, "epsilon": 0.0}, doubling="nothing"
    ),
    "iso-c": Laws(),
    "iso-cts": Laws(),
    "karcher": Laws(identity={}, copies={}),
    "knots": Laws(identity={"density": 1.0}, copies={"density": 1.0}, doubling="nothing"),
    "lego": Laws(identity={}, copies={}, doubling="nothing"),
    "linear": Laws(identity={}, copies={}, linear=True),
    "model-stock": Laws(identity={}, copies={}),
    "multislerp": Laws(identity={}, copies={}),
    "norm-matched": Laws(identity={}, copies={}),
    "nuslerp": Laws(identity={}, copies={}, takes=2),
    "orthogonal": Laws(identity={}, copies={"share": 1.0}),
    "peft-dare-linear": Laws(identity={"density": 1.0}, gauge=False, padding=False, equal_ranks=True),
    "peft-dare-ties": Laws(
        identity={"density": 1.0},
        copies={"density": 1.0},
        sign=False,
        gauge=False,
        padding=False,
        dropping=False,
        equal_ranks=True,
    ),
    "peft-linear": Laws(identity={}, gauge=False, equal_ranks=True),
    "peft-magnitude-prune": Laws(identity={"density": 1.0}, gauge=False, padding=False, equal_ranks=True),
    "peft-ties": Laws(
        identity={"density": 1.0},
        copies={"density": 1.0},
        sign=False,
        gauge=False,
        padding=False,
        dropping=False,
        equal_ranks=True,
    ),
    "pico": Laws(identity={}, doubling="nothing"),
    "rank-dare": Laws(identity={"density": 1.0}, copies={"density": 1.0}),
    "regmean": Laws(identity={}, copies={}, doubling="nothing"),
    "sce": Laws(identity={}, copies={}),
    "slerp": Laws(identity={}, copies={}, takes=2),
    "ties": Laws(identity={"density": 1.0}, copies={"density": 1.0}, doubling="nothing"),
    "tsv": Laws(identity={}, copies={}),
    "wudi": Laws(identity={}, copies={}),
}


def factors(rank: int, seed: int) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.randn(OUT, rank, generator=g, dtype=torch.float64),
        torch.randn(rank, IN, generator=g, dtype=torch.float64),
    )


def inputs(seed: int) -> Tensor:
    return torch.randn(40, IN, generator=torch.Generator().manual_seed(100 + seed), dtype=torch.float64)


MIXED = Updates(
    tuple(factors(rank, seed) for rank, seed in ((2, 1), (5, 2), (3, 3), (1, 4))),
    keys=(11, 12, 13, 14),
    scales=(1.0, 0.5, 2.0, 0.25),
    inputs=tuple(inputs(seed) for seed in range(4)),
)
EQUAL = replace(MIXED, items=tuple(factors(3, seed) for seed in (1, 2, 3, 4)))
WEIGHTS = [0.4, 1.0, 0.25, 2.0]
every_method = pytest.mark.parametrize("name", sorted(METHODS.methods))


def taken(updates: Updates, places: Sequence[int]) -> Updates:
    """The adapters at `places`, in that order."""
    picked = {name: tuple(getattr(updates, name)[i] for i in places) for name in ("items", "keys", "scales", "inputs")}
    return replace(updates, **picked)


def pool_of(name: str) -> Updates:
    """Four adapters, of mixed ranks where the method takes them."""
    return EQUAL if LAWS[name].equal_ranks else MIXED


def case_of(name: str) -> tuple[Updates, list[float]]:
    """As many adapters as the method takes."""
    n = LAWS[name].takes or len(MIXED)
    return taken(pool_of(name), range(n)), WEIGHTS[:n]


def mapped(updates: Updates, change: Any) -> Updates:
    return replace(updates, items=tuple(change(update) for update in updates))


def merged(name: str, updates: Updates, weights: Sequence[float], **knobs: Any) -> Tensor:
    """The dense result of a method under the knobs its laws are tested with."""
    settings = METHODS.check(name, (LAWS[name].knobs or {}) | knobs)
    result = run_method(name, updates, torch.tensor(weights, dtype=torch.float64), settings)
    return result if isinstance(result, Tensor) else result.dense()


def expected(name: str, updates: Updates, weights: Sequence[float], **knobs: Any) -> Tensor:
    """The same from the dense reference."""
    [reference] = [found for module in REFERENCES if (found := getattr(module, name.replace("-", "_"), None))]
    case = Case(
        [(u.B.numpy(), u.A.numpy()) for u in updates],
        list(weights),
        keys=list(updates.keys),
        scales=list(updates.scales),
        inputs=[x.numpy() for x in updates.inputs],
    )
    return torch.from_numpy(reference(case, **((LAWS[name].knobs or {}) | knobs)))


def same(actual: Tensor, wanted: Tensor, tolerance: float = 1e-9) -> None:
    assert float((actual - wanted).norm()) <= tolerance * float(wanted.norm()) + 1e-10


def test_every_method_states_its_laws() -> None:
    assert sorted(LAWS) == sorted(METHODS.methods)


@pytest.mark.slow
@every_method
@pytest.mark.parametrize("weights", [WEIGHTS, [1.0] * 4, [0.5, -1.0, 0.25, 1.5]], ids=["mixed", "ones", "signed"])
def test_equals_the_dense_reference_on_mixed_ranks(name: str, weights: list[float]) -> None:
    updates, _ = case_of(name)
    weights = weights[: len(updates)]
    same(merged(name, updates, weights), expected(name, updates, weights), LAWS[name].tolerance)


@pytest.mark.slow
@every_method
def test_the_order_of_adapters_matters_only_where_it_is_declared(name: str) -> None:
    updates, weights = case_of(name)
    order = [2, 0, 3, 1][: len(updates)] if len(updates) == 4 else [1, 0]
    once, again = merged(name, updates, weights), merged(name, taken(updates, order), [weights[i] for i in order])
    if METHODS.get(name).ordered:
        assert float((again - once).norm()) > 0.01 * float(once.norm()), "declared as ordered"
    else:
        same(again, once, 1e-8)


@every_method
def test_one_adapter_with_weight_one_comes_back(name: str) -> None:
    knobs = LAWS[name].identity
    if knobs is None:
        pytest.skip(f"{name} changes a single adapter")
    same(merged(name, taken(MIXED, [1]), [1.0], **knobs), MIXED[1].dense(), 1e-8)


@every_method
def test_copies_come_back_as_the_adapter(name: str) -> None:
    knobs = LAWS[name].copies
    if knobs is None:
        pytest.skip(f"{name} changes copies")
    n = LAWS[name].takes or 5
    weight = 1 / n if METHODS.get(name).weights == "average" else 1.0
    copies = replace(taken(MIXED, [1] * n), keys=tuple(range(n)))
    same(merged(name, copies, [weight] * n, **knobs), MIXED[1].dense(), 1e-8)


@pytest.mark.slow
@every_method
@pytest.mark.parametrize("factor", [3.0, -1.0, 1e-4])
def test_a_common_factor_on_all_adapters_comes_out(name: str, factor: float) -> None:
    if not (LAWS[name].sign if factor < 0 else LAWS[name].scale):
        pytest.skip(f"{name} is not homogeneous")
    updates, weights = case_of(name)
    scaled = mapped(updates, lambda u: u.scaled(factor))
    same(merged(name, scaled, weights) / factor, merged(name, updates, weights), 1e-8)


@pytest.mark.slow
@every_method
def test_only_the_product_of_the_factors_matters(name: str) -> None:
    if not LAWS[name].gauge:
        pytest.skip(f"{name} works on A and B apart")
    g = torch.Generator().manual_seed(9)

    def turned(u: LowRank) -> LowRank:
        m = torch.randn(u.rank, u.rank, generator=g, dtype=torch.float64) + 3 * torch.eye(u.rank, dtype=torch.float64)
        return LowRank(u.B @ m, torch.linalg.solve(m, u.A))

    updates, weights = case_of(name)
    same(merged(name, mapped(updates, turned), weights), merged(name, updates, weights), 1e-7)


@every_method
def test_padding_with_zero_ranks_changes_nothing(name: str) -> None:
    if not LAWS[name].padding:
        pytest.skip(f"{name} counts ranks")
    updates, weights = case_of(name)
    pad = torch.nn.functional.pad
    padded = mapped(updates, lambda u: LowRank(pad(u.B, (0, 2)), pad(u.A, (0, 0, 0, 2))))
    same(merged(name, padded, weights), merged(name, updates, weights), 1e-8)


@every_method
def test_weights_act_as_the_method_says(name: str) -> None:
    updates, weights = case_of(name)
    once, twice = merged(name, updates, weights), merged(name, updates, [2 * w for w in weights])
    if LAWS[name].doubling == "nothing":
        same(twice, once, 1e-8)
    elif LAWS[name].doubling == "doubles":
        same(twice, 2 * once, 1e-8)
    if LAWS[name].linear:
        same(once, sum(w * u.dense() for w, u in zip(weights, updates, strict=True)))


@every_method
def test_a_weight_of_zero_takes_an_adapter_out(name: str) -> None:
    if not LAWS[name].dropping or LAWS[name].takes:
        pytest.skip(f"{name} counts its adapters")
    without = merged(name, taken(pool_of(name), [0, 2, 3]), [1.0, 2.0, 1.0])
    same(merged(name, pool_of(name), [1.0, 0.0, 2.0, 1.0]), without, 1e-8)


@pytest.mark.parametrize("density", [0.05, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("election", ["total", "frequency"])
def test_ties_equals_its_paper_at_every_density(density: float, election: str) -> None:
    knobs = {"density": density, "election": election}
    same(merged("ties", MIXED, WEIGHTS, **knobs), expected("ties", MIXED, WEIGHTS, **knobs))


def test_ties_elects_nothing_where_signs_cancel() -> None:
    u = MIXED[0]
    opposed = replace(taken(MIXED, [0, 1]), items=(u, u.scaled(-1.0)))
    assert not merged("ties", opposed, [1.0, 1.0], density=1.0).any()


def test_ties_keeps_all_entries_that_tie_at_the_border() -> None:
    ones = LowRank(torch.ones(OUT, 1, dtype=torch.float64), torch.ones(1, IN, dtype=torch.float64))
    alone = replace(taken(MIXED, [0]), items=(ones,))
    same(merged("ties", alone, [1.0], density=0.1), torch.ones(OUT, IN, dtype=torch.float64))


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_orthogonal_leaves_what_came_before_in_place(share: float) -> None:
    first, whole = MIXED[1].dense(), merged("orthogonal", taken(MIXED, [1, 2]), [1.0, 1.0], share=share)
    same(whole, expected("orthogonal", taken(MIXED, [1, 2]), [1.0, 1.0], share=share))
    u, s, vt = torch.linalg.svd(first)
    kept = int((s.cumsum(0) < share * s.sum() * (1 - 1e-12)).sum()) + 1
    same(whole @ vt[:kept].T, first @ vt[:kept].T)
    same(u[:, :kept].T @ whole, u[:, :kept].T @ first)
    assert float((whole - first).norm()) > 0.1


def test_orthogonal_in_two_merges_is_orthogonal_in_one() -> None:
    running = LowRank(merged("orthogonal", taken(MIXED, [0, 1, 2]), WEIGHTS[:3]), torch.eye(IN, dtype=torch.float64))
    later = replace(taken(MIXED, [0, 3]), items=(running, MIXED[3]))
    same(merged("orthogonal", later, [1.0, WEIGHTS[3]]), merged("orthogonal", MIXED, WEIGHTS))
