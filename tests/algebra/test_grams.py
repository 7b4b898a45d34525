"""The leading directions from Gram matrices against a dense SVD in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lora_cli.algebra.grams import leading
from lora_cli.algebra.lowrank import LowRank, RankChoice, concat, gram, reduce
from lora_cli.algebra.spectra import polar, times_polar
from lora_cli.algebra.updates import Updates
from lora_cli.steps.merge.module import run_method

OUT, IN, N, RANK = 240, 200, 12, 8


def _drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _adapter(seed: int, fall: float) -> LowRank:
    """Rank 8 with singular values that fall by a factor, in factors as training leaves them: mixed by a rotation."""
    turn = torch.linalg.qr(_drawn(RANK, RANK, seed=seed + 1000))[0]
    root = (fall ** torch.arange(RANK, dtype=torch.float64)).sqrt()
    return LowRank(_drawn(OUT, RANK, seed=seed) * root @ turn, (turn.T * root) @ _drawn(RANK, IN, seed=seed + 500))


def _all(fall: float) -> list[LowRank]:
    return [_adapter(seed, fall) for seed in range(N)]


def _sharing(shared: float) -> list[LowRank]:
    """One strong direction in all of them."""
    u, v = _drawn(OUT, 1, seed=91), _drawn(1, IN, seed=92)
    return [concat([one, LowRank(u * shared, v)], [1, 1]) for one in _all(0.8)]


def _noisy_copies(noise: float) -> list[LowRank]:
    first = _adapter(0, 0.9)
    return [concat([first, _adapter(seed, 1.0).scaled(noise)], [1, 1]) for seed in range(N)]


def _opposed(rest: float) -> list[LowRank]:
    """Pairs that cancel but for a rest."""
    half = _all(1.0)[: N // 2]
    return [*half, *(concat([one, _adapter(70 + i, 1.0)], [-1, rest]) for i, one in enumerate(half))]


def _gauge(spread: float) -> list[LowRank]:
    size = 10 ** _drawn(RANK, seed=8).mul(spread)
    return [LowRank(one.B * size, one.A / size[:, None]) for one in _all(1.0)]


POOLS: dict[str, Callable[[], list[LowRank]]] = {
    "flat": lambda: _all(1.0),
    "falling": lambda: _all(0.7),
    "steep": lambda: _all(0.3),
    "very steep": lambda: _all(0.05),
    "one shared direction": lambda: _sharing(1.0),
    "one dominant direction": lambda: _sharing(30.0),
    "near copies": lambda: _noisy_copies(1e-2),
    "nearer copies": lambda: _noisy_copies(1e-4),
    "cancelling": lambda: _opposed(1e-2),
    "huge": lambda: [one.scaled(1e20) for one in _all(1.0)],
    "tiny": lambda: [one.scaled(1e-30) for one in _all(1.0)],
    "of many sizes": lambda: [one.scaled(10.0 ** (i % 5 - 2)) for i, one in enumerate(_all(0.8))],
    "halves of many sizes": lambda: _gauge(4.0),
    "with an empty one": lambda: [*_all(1.0), LowRank(torch.zeros(OUT, 4).double(), torch.zeros(4, IN).double())],
}


@pytest.mark.parametrize("k", [4, 16, 40])
@pytest.mark.parametrize("name", POOLS)
def test_a_reduced_sum_is_as_near_as_can_be_and_says_how_near(name: str, k: int) -> None:
    narrow = [one.to(torch.float32) for one in POOLS[name]()]
    merged = concat(narrow, [1 / N] * len(narrow))
    whole = merged.B.double() @ merged.A.double()
    left = torch.linalg.svdvals(whole)[k:].square().sum()
    total = whole.square().sum()
    reduced = reduce(merged, RankChoice(ceiling=k))
    found = reduced.update.B.double() @ reduced.update.A.double()
    lost = (whole - found).square().sum()
    assert reduced.update.rank <= k
    # 16 roundings of fp32 are the level at which directions are dropped.
    assert float(lost.sqrt()) <= 1.001 * float(left.sqrt()) + 2e-6 * float(total.sqrt())
    assert reduced.kept / reduced.total == pytest.approx(1 - float(left / total), abs=1e-5)
    assert reduced.total == pytest.approx(float(total), rel=1e-5)
    balanced = reduced.update.B.norm(dim=0), reduced.update.A.norm(dim=1)
    torch.testing.assert_close(*balanced, rtol=1e-4, atol=0)


@pytest.mark.parametrize("shape", [(120, 300), (300, 120)])
def test_directions_are_orthonormal_and_in_order(shape: tuple[int, int]) -> None:
    update = LowRank(_drawn(shape[0], 60, seed=1).float(), _drawn(60, shape[1], seed=2).float())
    found = leading(update.B, update.A, update.grams, 20)
    assert found is not None
    for side in (found.U, found.V):
        torch.testing.assert_close(side.T @ side, torch.eye(20), rtol=0, atol=1e-5)
    exact = torch.linalg.svdvals(update.B.double() @ update.A.double())[:20]
    torch.testing.assert_close(found.s.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("turned", [False, True])
def test_directions_beyond_the_rank_of_a_sum_are_finite(turned: bool) -> None:
    """Three adapters of one A whose sum nearly cancels have four directions in all; the others are rounding noise."""
    for seed in range(0, 80, 4):
        shared, one = _drawn(4, 96, seed=seed).float(), _drawn(64, 4, seed=seed + 1).float()
        near, small = (0.1 * _drawn(64, 4, seed=seed + more).float() for more in (2, 3))
        sides = [(b, shared) for b in (one, -one - near, small)]
        merged = concat([LowRank(a.T, b.T) if turned else LowRank(b, a) for b, a in sides], [1, 1, 1])
        found = leading(merged.B, merged.A, merged.grams, 6)
        assert found is not None
        assert torch.isfinite(found.U).all()
        assert torch.isfinite(found.V).all()


def test_flat_spectra_need_no_float64_and_steep_ones_do() -> None:
    """What is cheap stays cheap: fp32 alone decides where its rounding is far below what is lost."""
    for fall, precise in ((1.0, False), (0.05, True)):
        merged = concat([one.to(torch.float32) for one in _all(fall)], [1 / N] * N)
        reduce(merged, RankChoice(ceiling=16))
        found = merged.grams.found
        assert found is not None
        assert (found.dtype == torch.float64) == precise


def test_the_sum_of_updates_shares_their_gram_matrices() -> None:
    items = _all(0.8)
    updates = Updates(tuple(items), keys=tuple(range(N)), scales=(1.0,) * N)
    weights = torch.linspace(-1, 2, N, dtype=torch.float64)
    merged = updates.sum(weights)
    expected = LowRank(merged.B, merged.A).grams.wide()
    torch.testing.assert_close(merged.grams.wide().products, expected.products, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(updates.gram(), gram(items), rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(updates.squares(), gram(items).diagonal(), rtol=1e-10, atol=0)
    dense = merged.dense().square().sum()
    torch.testing.assert_close(updates.square_of_sum(weights), dense, rtol=1e-10, atol=0)


def test_a_sum_that_was_formed_to_be_measured_serves_its_multiples_alone() -> None:
    updates = Updates(tuple(_adapter(seed, 0.9) for seed in range(40)), keys=tuple(range(40)), scales=(1.0,) * 40)
    weights = torch.linspace(-1, 2, 40, dtype=torch.float64)
    dense = updates.sum(weights).dense()
    torch.testing.assert_close(updates.square_of_sum(weights), dense.square().sum(), rtol=1e-10, atol=0)
    for factor in (-1 / 3, 7.1):
        multiple = updates.sum(weights * factor)
        assert multiple.formed is not None
        torch.testing.assert_close(multiple.dense(), multiple.B @ multiple.A, rtol=1e-10, atol=1e-10)
    others = weights.clone()
    others[3] += 1e-9
    assert updates.sum(others).formed is None
    assert updates.square_of_sum(0 * weights) == 0
    assert updates.sum(0 * weights).formed is None


def test_norms_of_updates_whose_terms_cancel_are_exact() -> None:
    one = _adapter(0, 1.0).to(torch.float32)
    rest = _adapter(1, 1.0).to(torch.float32).scaled(1e-4)
    updates = Updates((concat([one, one, rest], [1, -1, 1]), one), keys=(0, 1), scales=(1.0, 1.0))
    updates.grams.any()
    torch.testing.assert_close(updates.squares()[0].sqrt(), rest.norm(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(30, 50), (50, 30)])
def test_a_product_with_a_polar_factor_needs_no_polar_factor(shape: tuple[int, int]) -> None:
    x, y = _drawn(*shape, seed=1), _drawn(7, shape[1], seed=2)
    x[:, 3] = x[:, 4]
    torch.testing.assert_close(times_polar(y, x), y @ polar(x).T, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("k", [4, 16, 40])
@pytest.mark.parametrize("method", ["linear", "norm-matched"])
def test_sums_of_more_ranks_than_the_module_has_are_as_near_as_can_be(method: str, k: int) -> None:
    items = tuple(_adapter(seed, 0.9).to(torch.float32) for seed in range(40))
    updates = Updates(items, keys=tuple(range(40)), scales=(1.0,) * 40)
    assert updates.outgrown
    weights = torch.full((40,), 1 / 40, dtype=torch.float64)
    reduced = reduce(
        run_method(method, updates, weights, {"per": "module"} if method != "linear" else {}), RankChoice(k)
    )
    whole = sum(one.B.double() @ one.A.double() for one in items) / 40
    if method == "norm-matched":
        norms = torch.stack([torch.linalg.norm(one.B.double() @ one.A.double()) for one in items])
        whole = whole * norms.mean() / torch.maximum(torch.linalg.norm(whole), norms.norm() / 40)
    left = torch.linalg.svdvals(whole)[k:].square().sum().sqrt()
    lost = torch.linalg.norm(whole - reduced.update.B.double() @ reduced.update.A.double())
    assert float(lost) <= 1.001 * float(left)
    assert reduced.kept / reduced.total == pytest.approx(1 - float(lost / torch.linalg.norm(whole)) ** 2, abs=1e-5)
