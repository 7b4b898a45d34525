"""The compiled loop over whole modules, bit by bit beside plain numpy on the entries that it forms."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lora_cli.algebra import kernels
from lora_cli.algebra.fused import Drop, Entries
from lora_cli.algebra.lowrank import LowRank
from lora_cli.algebra.tiles import DeltaTiles
from lora_cli.algebra.updates import Updates
from lora_cli.merge_methods.breadcrumbs import breadcrumbs
from lora_cli.merge_methods.dare import dare
from lora_cli.merge_methods.dare_ties import dare_ties
from lora_cli.merge_methods.ties import ties
from tests.dense_reference import draws

Array = NDArray[Any]

WEIGHTS = [0.5, -1.0, 2.0, 0.0, 0.25]


def random(out: int, inn: int, r: int, seed: int, dtype: torch.dtype = torch.float32) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(out, r, generator=g).to(dtype), torch.randn(r, inn, generator=g).to(dtype))


def whole_numbers(seed: int) -> LowRank:
    """Few magnitudes, each many times: most thresholds are shared by thousands of entries."""
    g = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.randint(-2, 3, (170, 2), generator=g).float(), torch.randint(-1, 2, (2, 530), generator=g).float()
    )


def mostly_zero(seed: int) -> LowRank:
    u = random(170, 530, 3, seed)
    return LowRank(u.B * (torch.arange(170) % 9 == 0)[:, None], u.A)


def near_copy(seed: int) -> LowRank:
    one, other = random(170, 530, 3, 0), random(170, 530, 3, seed)
    return LowRank(one.B + 1e-7 * other.B, one.A)


CASES: dict[str, Callable[[int], LowRank]] = {
    "mixed ranks": lambda i: random(170, 530, [1, 16, 8, 33, 4][i], i),
    "high rank": lambda i: random(50, 300, [200, 1100, 16, 8, 4][i], i),
    "double": lambda i: random(170, 530, 6, i, torch.float64),
    "whole numbers": whole_numbers,
    "mostly zero": mostly_zero,
    "near copies": near_copy,
    "huge": lambda i: LowRank(random(170, 530, 4, i).B * 1e16, random(170, 530, 4, i + 9).A * 1e16),
    "tiny": lambda i: LowRank(random(170, 530, 4, i).B * 1e-20, random(170, 530, 4, i + 9).A * 1e-20),
    "small scale": lambda i: LowRank(random(170, 530, 4, i).B * 1e-9, random(170, 530, 4, i + 9).A * 1e-9),
    "scales apart": lambda i: LowRank(random(170, 530, 4, i).B * 10.0 ** (9 * i - 18), random(170, 530, 4, i + 9).A),
    "small": lambda i: random(3, 2, 1, i),
    "no rank": lambda i: LowRank(torch.zeros(20, 0), torch.zeros(0, 30)) if i else random(20, 30, 2, 5),
}


def several(case: str) -> Updates:
    items = tuple(CASES[case](i) for i in range(5))
    return Updates(items, keys=tuple(range(3, 8)), scales=(1.0,) * 5)


def formed(updates: Updates) -> list[Array]:
    """Every update as the loop forms it."""
    return [
        DeltaTiles(Updates((u,), keys=(0,), scales=(1.0,))).sum(Entries([1.0])).numpy().copy() for u in updates.items
    ]


def cut(dense: Array, density: float) -> float:
    """By sorting everything; 0 where all entries are kept."""
    k = max(1, round(density * dense.size))
    return 0.0 if k == dense.size else float(np.sort(np.abs(dense), axis=None)[-k])


def elected(kept: list[Array], election: str) -> Array:
    """One adapter after another, in the precision of the entries."""
    plus, minus, agreed, against, votes = (np.zeros_like(kept[0]) for _ in range(5))
    for entries, weight in zip(kept, WEIGHTS, strict=True):
        value = entries * entries.dtype.type(weight)
        plus += np.where(value > 0, value, 0)
        minus += np.where(value < 0, value, 0)
        agreed += np.where(value > 0, entries.dtype.type(abs(weight)), 0)
        against += np.where(value < 0, entries.dtype.type(abs(weight)), 0)
        votes += np.sign(entries) * entries.dtype.type(np.sign(weight))
    if election == "total":
        votes = plus + minus
    share = np.where(votes > 0, agreed, against)
    won = np.where(votes > 0, plus, np.where(votes < 0, minus, 0))
    return won / np.where(share == 0, 1, share)


def weights() -> torch.Tensor:
    return torch.tensor(WEIGHTS, dtype=torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("density", [0.001, 0.2, 0.9, 1.0])
@pytest.mark.parametrize("case", CASES)
def test_ties_is_bit_for_bit_that_of_sorted_entries(case: str, density: float) -> None:
    updates = several(case)
    dense = formed(updates)
    for one, update in zip(dense, updates, strict=True):
        np.testing.assert_allclose(one, update.B.double() @ update.A.double(), rtol=1e-4, atol=1e-5 * np.abs(one).max())
    cuts = [cut(one, density) for one in dense]
    assert DeltaTiles(updates).thresholds(density).tolist() == cuts
    assert DeltaTiles(updates, workers=7).thresholds(density).tolist() == cuts
    kept = [np.where(np.abs(one) >= least, one, 0) for one, least in zip(dense, cuts, strict=True)]
    for election in ("total", "frequency"):
        result = ties(DeltaTiles(updates, workers=2), weights(), density=density, election=election)  # type: ignore[arg-type]
        np.testing.assert_array_equal(result.numpy(), elected(kept, election))


@pytest.mark.parametrize("case", ["mixed ranks", "double", "whole numbers", "small scale"])
def test_the_rest_of_the_family_is_bit_for_bit_that_of_plain_numpy(case: str) -> None:
    updates = several(case)
    dense = formed(updates)
    drawn = [draws(5, key, one.size).reshape(one.shape) for one, key in zip(dense, updates.keys, strict=True)]
    left = [np.where(numbers < np.float32(0.3), one, 0) for one, numbers in zip(dense, drawn, strict=True)]
    result = dare_ties(DeltaTiles(updates, workers=2), weights(), density=0.3, seed=5)
    np.testing.assert_array_equal(result.numpy(), elected([one / one.dtype.type(0.3) for one in left], "total"))

    # With powers of two as weights a product is exact, so that it does not matter whether it is rounded.
    def summed(kept: list[Array], factor: float) -> Array:
        total = np.zeros_like(kept[0])
        for one, weight in zip(kept, WEIGHTS, strict=True):
            total += one * one.dtype.type(weight * factor)
        return total

    left = [np.where(numbers < 0.25, one, 0) for one, numbers in zip(dense, drawn, strict=True)]
    result = dare(DeltaTiles(updates, workers=2), weights(), density=0.25, seed=5)
    np.testing.assert_array_equal(result.numpy(), summed(left, 4))
    within = [np.where((np.abs(one) >= cut(one, 0.3)) & (np.abs(one) < cut(one, 0.1)), one, 0) for one in dense]
    result = breadcrumbs(DeltaTiles(updates, workers=2), weights(), density=0.2, gamma=0.1)
    np.testing.assert_array_equal(result.numpy(), summed(within, 1))


def test_what_is_not_compiled_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    updates = several("mixed ranks")
    both = Entries(WEIGHTS, low=[0.5] * 5, high=[2.0] * 5, drop=Drop(0.7, 4))

    def found() -> list[torch.Tensor]:
        tiles = DeltaTiles(updates)
        return [tiles.sum(both), tiles.sum(Entries(WEIGHTS)), tiles.elect(both), tiles.elect(both, "frequency")]

    compiled = found()
    monkeypatch.setattr(kernels, "COMPILED", False)
    for one, other in zip(compiled, found(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert one.any()
