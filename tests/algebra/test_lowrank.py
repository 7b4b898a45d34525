"""The low-rank algebra against dense float64 arithmetic."""

import pytest
import torch

from lora_cli.algebra.krylov import blocks
from lora_cli.algebra.lowrank import (
    LowRank,
    RankChoice,
    concat,
    dense_svd,
    gram,
    inner,
    numerical_rank,
    reduce,
    svd,
)


def update(out: int, inn: int, r: int, seed: int, dtype: torch.dtype = torch.float64) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.randn(out, r, generator=g, dtype=torch.float64).to(dtype),
        torch.randn(r, inn, generator=g, dtype=torch.float64).to(dtype),
    )


SHAPES = [(40, 30, 4), (30, 40, 4), (12, 50, 20), (50, 12, 20), (9, 9, 9), (16, 24, 1)]


@pytest.mark.parametrize(("out", "inn", "r"), SHAPES)
def test_inner_product_and_norm_equal_the_dense_ones(out: int, inn: int, r: int) -> None:
    x, y = update(out, inn, r, 1), update(out, inn, r + 2, 2)
    torch.testing.assert_close(inner(x, y), (x.dense() * y.dense()).sum(), rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(x.norm(), torch.linalg.norm(x.dense()), rtol=1e-12, atol=0)


def test_gram_holds_all_inner_products() -> None:
    updates = [update(20, 16, r, seed) for seed, r in enumerate((2, 5, 3))]
    flat = torch.stack([u.dense().flatten() for u in updates])
    torch.testing.assert_close(gram(updates), flat @ flat.T, rtol=1e-11, atol=1e-10)


@pytest.mark.parametrize(("out", "inn", "r"), SHAPES)
def test_concatenation_is_the_weighted_sum(out: int, inn: int, r: int) -> None:
    updates = [update(out, inn, r, 1), update(out, inn, 2, 2), update(out, inn, 7, 3)]
    weights = [0.5, -1.25, 3.0]
    merged = concat(updates, weights)
    assert merged.rank == r + 2 + 7
    expected = sum(w * u.dense() for w, u in zip(weights, updates, strict=True))
    torch.testing.assert_close(merged.dense(), expected, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize(("out", "inn", "r"), SHAPES)
def test_svd_of_factors_is_the_svd_of_the_update(out: int, inn: int, r: int) -> None:
    u = update(out, inn, r, 5)
    spectrum = svd(u)
    k = min(out, inn, r)
    torch.testing.assert_close(spectrum.s[:k], torch.linalg.svdvals(u.dense())[:k], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(spectrum.truncated(k).dense(), u.dense(), rtol=1e-10, atol=1e-10)
    assert numerical_rank(spectrum.s) == k


@pytest.mark.parametrize("k", [1, 3, 6])
def test_reduction_loses_exactly_the_tail_of_the_spectrum(k: int) -> None:
    u = update(40, 30, 8, 7)
    tail = torch.linalg.svdvals(u.dense())[k:8]
    reduced = reduce(u, RankChoice(ceiling=k))
    assert reduced.update.rank == k
    lost = torch.linalg.norm(u.dense() - reduced.update.dense())
    torch.testing.assert_close(lost, tail.square().sum().sqrt(), rtol=1e-9, atol=0)
    assert reduced.kept / reduced.total == pytest.approx(float(1 - tail.square().sum() / u.norm() ** 2), rel=1e-10)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("dense", [False, True])
def test_energy_keeps_the_fewest_directions_that_hold_it(energy: float, dense: bool) -> None:
    u = update(40, 30, 12, 9)
    reduced = reduce(u.dense() if dense else u, RankChoice(energy=energy))
    share = torch.linalg.svdvals(u.dense()).square().cumsum(0) / u.norm() ** 2
    expected = int((share < energy - 1e-9).sum()) + 1
    assert reduced.update.rank == expected
    assert reduced.kept >= (energy - 1e-9) * reduced.total


def test_copies_have_the_rank_of_one() -> None:
    u = update(64, 48, 5, 11, torch.float32)
    reduced = reduce(concat([u] * 6, [1 / 6] * 6), RankChoice(ceiling=64))
    assert reduced.update.rank == 5
    torch.testing.assert_close(reduced.update.dense(), u.dense(), rtol=1e-4, atol=1e-5)


def test_an_update_of_zero_reduces_to_rank_zero() -> None:
    nothing = LowRank(torch.zeros(6, 0, dtype=torch.float64), torch.zeros(0, 5, dtype=torch.float64))
    assert reduce(nothing, RankChoice(ceiling=4)).update.rank == 0
    assert reduce(torch.zeros(6, 5), RankChoice(ceiling=4)).update.rank == 0
    assert float(nothing.norm()) == 0


def test_the_randomised_svd_finds_the_leading_directions() -> None:
    g = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 200, generator=g, dtype=torch.float64))[0] for n in (400, 300))
    s = 0.9 ** torch.arange(200, dtype=torch.float64)
    delta = u * s @ v.T
    spectrum = dense_svd(delta, 12)
    torch.testing.assert_close(spectrum.s, s[:12], rtol=1e-4, atol=0)
    best = float(s[12:].square().sum().sqrt())
    assert float(torch.linalg.norm(delta - spectrum.truncated(12).dense())) <= best * 1.0001


def test_factors_that_do_not_fit_are_a_bug_of_the_caller() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        LowRank(torch.zeros(3, 2), torch.zeros(4, 5))


def test_the_randomised_svd_keeps_nearly_all_that_a_rank_can_hold_of_a_flat_spectrum() -> None:
    delta = torch.randn(500, 400, generator=torch.Generator().manual_seed(3))
    s = torch.linalg.svdvals(delta.double())
    for k in (4, 16, 64):
        found = dense_svd(delta, k).truncated(k).dense().double()
        missed = float((delta.double() - found).square().sum() - s[k:].square().sum())
        assert missed < 0.02 * float(s[:k].square().sum())


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_the_randomised_svd_holds_at_the_ends_of_the_range(size: float) -> None:
    delta = torch.randn(200, 150, generator=torch.Generator().manual_seed(3))
    plain, sized = dense_svd(delta, 8), dense_svd(delta * size, 8)
    torch.testing.assert_close(sized.s.double() / size, plain.s.double(), rtol=1e-5, atol=0)
    error = torch.linalg.norm((plain.truncated(8).dense().double() * size - sized.truncated(8).dense().double()) / size)
    assert float(error) < 1e-3 * float(torch.linalg.norm(delta))


def test_blocks_stay_orthonormal_where_hardly_a_new_direction_is_left() -> None:
    generator = torch.Generator().manual_seed(3)
    factors = torch.randn(240, 60, generator=generator), torch.randn(60, 220, generator=generator)
    delta = factors[0] @ factors[1]
    *_, found = blocks(delta, 50)
    assert found.basis.shape == (240, 200)
    lean = found.basis.T.double() @ found.basis.double() - torch.eye(200)
    assert lean.norm() < 200 * torch.finfo(torch.float32).eps
    assert (delta - found.basis @ found.rows).norm() < 1e-6 * delta.norm()
