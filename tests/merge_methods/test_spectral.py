"""The spectral methods beyond the laws: float32 and its noise, copies that nearly are, wide stacks, nothing at all."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lora_cli.algebra.lowrank import LowRank, RankChoice, concat, reduce, svd
from lora_cli.algebra.spectra import basis, polar
from lora_cli.algebra.updates import Updates
from lora_cli.merge_options import METHODS
from lora_cli.steps.merge.module import run_method
from tests import dense_spectral
from tests.dense_reference import Case

SPECTRAL = ["tsv", "iso-c", "iso-cts", "knots", "core", "ctm", "pico"]
LINEAR_INSIDE = {name: {"inside": "linear"} for name in ("knots", "core", "ctm", "pico")}
every_spectral_method = pytest.mark.parametrize("name", SPECTRAL)


def drawn(rank: int, seed: int, shape: tuple[int, int] = (40, 30), decay: float = 0.7) -> LowRank:
    """A random update whose singular values fall."""
    g = torch.Generator().manual_seed(seed)
    fall = decay ** torch.arange(rank, dtype=torch.float64)
    return LowRank(
        torch.randn(shape[0], rank, generator=g, dtype=torch.float64) * fall,
        torch.randn(rank, shape[1], generator=g, dtype=torch.float64),
    )


def together(*items: LowRank) -> Updates:
    return Updates(items, keys=tuple(range(len(items))), scales=(1.0,) * len(items))


def in_float32(updates: Updates) -> Updates:
    return replace(updates, items=tuple(u.to(torch.float32) for u in updates))


def merged(name: str, updates: Updates, weights: Sequence[float], **knobs: Any) -> Tensor:
    result = run_method(name, updates, torch.tensor(weights, dtype=torch.float64), METHODS.check(name, knobs))
    return (result if isinstance(result, Tensor) else result.dense()).double()


def dense(name: str, updates: Updates, weights: Sequence[float], **knobs: Any) -> Tensor:
    case = Case([(u.B.numpy(), u.A.numpy()) for u in updates], list(weights), keys=list(updates.keys))
    return torch.from_numpy(getattr(dense_spectral, name.replace("-", "_"))(case, **knobs))


def apart(one: Tensor, other: Tensor) -> float:
    """Relative distance."""
    return float((one - other).norm() / other.norm())


MIXED = together(drawn(4, 1), drawn(7, 2), drawn(2, 3), drawn(5, 4))
ONES = [1.0] * 4


@every_spectral_method
def test_float32_factors_give_the_float64_result(name: str) -> None:
    knobs = LINEAR_INSIDE.get(name, {})
    rounded = in_float32(MIXED)
    exact = replace(rounded, items=tuple(u.to(torch.float64) for u in rounded))
    assert apart(merged(name, rounded, ONES, **knobs), merged(name, exact, ONES, **knobs)) < 1e-5
    # ctm and the dense iteration stop at different distances from the same maximum.
    tolerance = 1e-5 if name != "ctm" else 1e-3
    assert apart(merged(name, rounded, ONES, **knobs), dense(name, exact, ONES, **knobs)) < tolerance


@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_tsv_of_three_copies_is_the_adapter(precision: torch.dtype) -> None:
    one = drawn(5, 1).to(precision)
    assert apart(merged("tsv", together(one, one, one), [1.0] * 3), one.dense().double()) < 1e-5


def test_tsv_of_copies_in_other_gauges_is_the_adapter_within_float32() -> None:
    one = drawn(5, 1)
    turns = [torch.randn(5, 5, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(3)]
    copies = [LowRank(one.B @ m, torch.linalg.solve(m, one.A)).to(torch.float32) for m in turns]
    assert apart(merged("tsv", together(*copies), [1.0] * 3), one.dense()) < 1e-5


@pytest.mark.parametrize("noise", [1e-7, 1e-6, 3e-6])
def test_tsv_takes_noise_between_copies_for_noise(noise: float) -> None:
    one = drawn(5, 1, decay=0.9)
    copies = [concat([one, drawn(1, seed).scaled(noise * float(one.norm()) / 40)], [1.0, 1.0]) for seed in (7, 8, 9)]
    assert apart(merged("tsv", together(*copies), [1.0] * 3), one.dense()) < 10 * noise


def test_tsv_beside_its_copies_leaves_the_others_alone() -> None:
    one, other = drawn(3, 1), drawn(4, 2)
    both, thrice = together(one, other), together(one, one, one, other)
    thirds = [1 / 3, 1 / 3, 1 / 3, 1.0]
    doubled = merged("tsv", together(one, one), [0.5, 0.5])
    assert apart(doubled, one.dense() / 2) < 1e-9
    assert float(merged("tsv", thrice, thirds).norm()) < float(merged("tsv", both, [1.0, 1.0]).norm())


def test_tsv_of_orthogonal_adapters_is_their_sum() -> None:
    U = torch.linalg.qr(torch.randn(40, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(30, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64))[0]
    one, other = LowRank(U[:, :4] * 3, V[:, :4].T), LowRank(U[:, 4:], V[:, 4:].T)
    assert apart(merged("tsv", together(one, other), [1.0, -0.5]), one.dense() - 0.5 * other.dense()) < 1e-12


@every_spectral_method
@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_more_ranks_than_a_side_has(name: str, precision: torch.dtype) -> None:
    wide = together(*(drawn(6, seed, shape=(20, 16), decay=0.9).to(precision) for seed in range(5)))
    knobs = LINEAR_INSIDE.get(name, {})
    exact = replace(wide, items=tuple(u.to(torch.float64) for u in wide))
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-8}[precision] if name != "ctm" else 1e-3
    assert apart(merged(name, wide, [1.0] * 5, **knobs), dense(name, exact, [1.0] * 5, **knobs)) < tolerance


@every_spectral_method
def test_an_adapter_that_does_nothing_changes_nothing(name: str) -> None:
    nothing = LowRank(torch.zeros(40, 3, dtype=torch.float64), drawn(3, 9).A)
    knobs = LINEAR_INSIDE.get(name, {})
    # Weights that say the same with and without it: pico's are shares.
    with_it = merged(name, together(*MIXED, nothing), [1.0, 0.5, 2.0, -1.0, 1e-12], **knobs)
    assert apart(with_it, merged(name, MIXED, [1.0, 0.5, 2.0, -1.0], **knobs)) < 1e-8


@every_spectral_method
@pytest.mark.parametrize("inside", ["linear", "ties"])
@pytest.mark.parametrize("rank", [0, 2])
def test_adapters_that_all_do_nothing_give_zero(name: str, inside: str, rank: int) -> None:
    nothing = LowRank(torch.zeros(40, rank), torch.zeros(rank, 30))
    knobs = {"inside": inside} if "inside" in METHODS.get(name).knobs else {}
    result = merged(name, together(nothing, nothing), [1.0, 1.0], **knobs)
    assert result.shape == (40, 30)
    assert not result.any()
    assert merged(name, together(MIXED[0], MIXED[1]), [0.0, 0.0], **knobs).norm() < 1e3


def test_iso_c_flattens_the_spectrum_and_keeps_its_mean() -> None:
    plain = torch.linalg.svdvals(sum(u.dense() for u in MIXED))[:18]
    flat = torch.linalg.svdvals(merged("iso-c", MIXED, ONES))
    assert torch.allclose(flat[:18], plain.mean().expand(18))
    assert float(flat[18:].amax()) < 1e-12
    one = MIXED[1]
    assert apart(merged("iso-c", together(one), [1.0]), one.dense()) > 0.1
    assert apart(merged("iso-c", together(one, one, one), [1.0] * 3), 3 * merged("iso-c", together(one), [1.0])) < 1e-9


def test_iso_cts_with_all_directions_common_is_iso_c() -> None:
    assert apart(merged("iso-cts", MIXED, ONES, common=1.0), merged("iso-c", MIXED, ONES)) < 1e-9


@pytest.mark.parametrize("common", [0.0, 0.3, 0.5, 0.8])
def test_iso_cts_equals_its_dense_form_at_every_share(common: float) -> None:
    knobs = {"common": common}
    assert apart(merged("iso-cts", MIXED, ONES, **knobs), dense("iso-cts", MIXED, ONES, **knobs)) < 1e-9


def test_iso_cts_takes_no_noise_for_a_direction_of_an_adapter() -> None:
    one = drawn(5, 1)
    copies = together(one, one.scaled(2.0))
    for precision in (torch.float32, torch.float64):
        rounded = replace(copies, items=tuple(u.to(precision) for u in copies))
        result = merged("iso-cts", rounded, [1.0, 1.0], common=0.4)
        assert apart(result, dense("iso-cts", copies, [1.0, 1.0], common=0.4)) < 1e-5
        assert np.linalg.matrix_rank(result.numpy(), rtol=1e-5) <= 5


@pytest.mark.parametrize("name", ["knots", "core"])
def test_a_linear_merge_inside_a_space_is_the_one_outside(name: str) -> None:
    weights = [0.4, 1.0, -0.25, 2.0]
    plain = sum(w * u.dense() for w, u in zip(weights, MIXED, strict=True))
    assert apart(merged(name, MIXED, weights, inside="linear"), plain) < 1e-12


@pytest.mark.parametrize("inside", ["tsv", "iso-c"])
def test_spectral_methods_in_core_space_are_themselves(inside: str) -> None:
    weights = [0.4, 1.0, -0.25, 2.0]
    assert apart(merged("core", MIXED, weights, inside=inside), merged(inside, MIXED, weights)) < 1e-9


@pytest.mark.parametrize(
    ("name", "inside"), [(n, i) for n in SPECTRAL[3:] for i in METHODS.get(n).knobs["inside"].choices]
)
def test_every_method_inside_equals_its_dense_form(name: str, inside: str) -> None:
    weights = [0.4, 1.0, 0.25, 2.0]
    knobs: dict[str, Any] = {"inside": inside} | ({"compress_to": 8} if name == "ctm" else {})
    tolerance = 1e-8 if name != "ctm" else 1e-3
    assert apart(merged(name, MIXED, weights, **knobs), dense(name, MIXED, weights, **knobs)) < tolerance


@pytest.mark.parametrize("name", ["knots", "core"])
def test_ties_inside_keeps_the_rank_low(name: str) -> None:
    result = run_method(name, in_float32(MIXED), torch.ones(4), METHODS.check(name, {"inside": "ties"}))
    assert isinstance(result, LowRank)
    assert result.B.dtype == torch.float32
    assert result.rank <= 18


@pytest.mark.parametrize("k", [1, 3, 6])
@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
def test_compressing_first_keeps_more_of_each_adapter_and_less_of_their_mean(k: int, beta: float) -> None:
    pool = together(*(drawn(6, seed, decay=0.6) for seed in range(6)))
    mean = sum(u.dense() for u in pool) / 6
    compressed = run_method(
        "ctm", pool, torch.full((6,), 1 / 6), METHODS.check("ctm", {"inside": "linear", "compress_to": k, "beta": beta})
    )
    afterwards = reduce(concat(pool, [1 / 6] * 6), RankChoice(ceiling=k)).update
    assert isinstance(compressed, LowRank)
    assert compressed.rank == k
    assert float((compressed.dense() - mean).norm()) >= float((afterwards.dense() - mean).norm())

    norms = [float(u.norm()) for u in pool]
    even = [(beta + (1 - beta) * np.mean(norms) / n) * u.dense() for u, n in zip(pool, norms, strict=True)]

    def energy(result: LowRank) -> float:
        found = svd(result)
        return sum(float((found.U.T @ one @ found.V).square().sum()) for one in even)

    assert energy(compressed) >= energy(afterwards)
    u, v = dense_spectral.shared_subspaces([one.dense().numpy() for one in pool], k, beta)
    best = sum(np.linalg.norm(u.T @ one.numpy() @ v) ** 2 for one in even)
    assert energy(compressed) >= (1 - 1e-4) * best


def test_compressing_to_more_than_there_is_loses_nothing() -> None:
    assert apart(merged("ctm", MIXED, ONES, inside="linear", compress_to=99), sum(u.dense() for u in MIXED)) < 1e-9


def test_pico_has_the_mean_norm_and_turns_the_shared_direction_down() -> None:
    g = torch.Generator().manual_seed(0)
    shared = torch.linalg.qr(torch.randn(40, 1, generator=g, dtype=torch.float64))[0]
    loud = [concat([LowRank(shared * 10, drawn(1, 20 + i).A), drawn(3, 30 + i)], [1.0, 1.0]) for i in range(4)]
    pool, quarter = together(*loud), [0.25] * 4
    result, plain = merged("pico", pool, quarter), merged("linear", pool, quarter)
    assert float(result.norm()) == pytest.approx(sum(float(u.norm()) for u in loud) / 4)

    def share(x: Tensor) -> float:
        return float((shared.T @ x).norm() / x.norm())

    assert share(result) < share(plain)


@pytest.mark.parametrize("shape", [(30, 8), (8, 30)])
def test_bases_and_polar_factors_are_those_of_the_svd(shape: tuple[int, int]) -> None:
    X = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    X[:, 3] = X[:, 2]
    u, s, vh = torch.linalg.svd(X, full_matrices=False)
    k = 7 if shape == (30, 8) else 8
    Q, C = basis(X)
    assert Q.shape == (shape[0], k)
    assert apart(Q @ C, X) < 1e-9
    assert torch.allclose((Q.T @ u[:, :k]).abs(), torch.eye(k, dtype=torch.float64), atol=1e-8)
    assert torch.allclose(C.norm(dim=1), s[:k])
    assert float(Q.gather(0, Q.abs().argmax(0, keepdim=True)).amin()) > 0
    assert apart(polar(X), u[:, :k] @ vh[:k]) < 1e-9
