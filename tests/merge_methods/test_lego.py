"""LoRA-LEGO: which ranks end in one cluster, what becomes of them, and what does not matter."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_cli.algebra.lowrank import LowRank
from lora_cli.algebra.updates import Updates
from lora_cli.errors import Refused
from lora_cli.merge_methods.lego import _KMeans
from tests.merge_methods.test_merge_laws import MIXED, WEIGHTS, expected, factors, mapped, merged, same, taken

TWO = replace(taken(MIXED, [1, 2]), scales=(1.0, 1.0))


def updates(items: Sequence[LowRank]) -> Updates:
    return Updates(tuple(items), keys=tuple(range(len(items))), scales=(1.0,) * len(items))


def lego(items: Updates, weights: Sequence[float] | None = None, **knobs: Any) -> Tensor:
    return merged("lego", items, weights or [1.0] * len(items), **knobs)


def orthonormal(features: int, rank: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(features, rank, generator=g, dtype=torch.float64))[0]


@pytest.mark.parametrize("gauge", ["svd", "balanced", "raw"])
@pytest.mark.parametrize("clusters", [1, 2, 4, 7, 10])
def test_equals_k_means_on_whole_points(gauge: str, clusters: int) -> None:
    knobs = {"gauge": gauge, "clusters": clusters, "seed": 3}
    same(merged("lego", MIXED, WEIGHTS, **knobs), expected("lego", MIXED, WEIGHTS, **knobs))


@pytest.mark.parametrize("gauge", ["svd", "balanced", "raw"])
def test_a_copy_with_its_ranks_in_another_order_changes_nothing(gauge: str) -> None:
    u, order = MIXED[1], [3, 0, 4, 1, 2]
    copy = LowRank(u.B[:, order], u.A[order])
    same(lego(updates([u, copy]), gauge=gauge), u.dense())


@pytest.mark.parametrize(
    "signs",
    [[-1.0, 1.0, -1.0, 1.0, 1.0], [-8.0, 0.25, 1.0, -1.0, 3.0]],
    ids=["signs", "scales"],
)
def test_a_copy_written_with_other_signs_or_scales_is_a_copy_to_the_svd_gauge_alone(signs: list[float]) -> None:
    u, s = MIXED[1], torch.tensor(signs, dtype=torch.float64)
    copies = updates([u, LowRank(u.B * s, u.A / s[:, None])])
    same(lego(copies), u.dense())
    assert float((lego(copies, gauge="raw") - u.dense()).norm()) > 0.1 * float(u.norm())


def test_the_balanced_gauge_takes_out_positive_scales() -> None:
    u, s = MIXED[1], torch.tensor([8.0, 0.25, 1.0, 2.0, 3.0], dtype=torch.float64)
    same(lego(updates([u, LowRank(u.B * s, u.A / s[:, None])]), gauge="balanced"), u.dense())


def test_the_raw_gauge_puts_half_of_the_scale_on_either_side() -> None:
    scaled = replace(TWO, items=tuple(u.scaled(4.0) for u in TWO), scales=(4.0, 4.0))
    halves = mapped(TWO, lambda u: LowRank(2 * u.B, 2 * u.A))
    same(lego(scaled, gauge="raw", clusters=3), lego(halves, gauge="raw", clusters=3))


def test_as_many_clusters_as_ranks_give_the_sum_scaled_for_its_variance() -> None:
    wanted = (4 / 8) ** 0.5 * (TWO[0].dense() + TWO[1].dense())
    for gauge in ("svd", "balanced", "raw"):
        same(lego(TWO, clusters=8, gauge=gauge), wanted)


def test_more_clusters_than_ranks_are_refused() -> None:
    with pytest.raises(Refused, match=r"more clusters \(9\) than ranks \(8\)"):
        lego(TWO, clusters=9)


def test_the_rank_is_the_mean_rank_unless_it_is_given() -> None:
    for clusters, rank in ((0, 3), (2, 2), (7, 7)):
        s = torch.linalg.svdvals(lego(MIXED, clusters=clusters))
        assert int((s > 1e-9 * s[0]).sum()) == rank


def test_planted_clusters_are_found() -> None:
    g = torch.Generator().manual_seed(5)
    planted = torch.arange(7).repeat_interleave(torch.tensor([3, 40, 11, 25, 8, 60, 13]))
    centres = 10 * torch.randn(7, 50, generator=g, dtype=torch.float64)
    points = centres[planted] + torch.randn(160, 50, generator=g, dtype=torch.float64)
    points *= torch.randint(2, (160, 1), generator=g) * 2 - 1
    races = torch.rand(10, 7, 160, generator=g, dtype=torch.float64)
    means = _KMeans(points @ points.T, torch.full((160,), 1 / 160, dtype=torch.float64), signed=False).best(races)
    found = means.abs().argmax(0)
    assert {tuple((found == c).nonzero()[:, 0].tolist()) for c in range(7)} == {
        tuple((planted == c).nonzero()[:, 0].tolist()) for c in range(7)
    }


def test_directions_that_all_adapters_share_come_back_without_their_noise() -> None:
    u, v = orthonormal(24, 4, 1), orthonormal(18, 4, 2)
    s = torch.tensor([8.0, 6.0, 4.0, 3.0], dtype=torch.float64)
    shared = LowRank(u * s, v.T)
    noisy = [LowRank(torch.cat([shared.B, 0.1 * n.B], 1), torch.cat([v.T, 0.1 * n.A])) for n in map(noise, range(30))]
    error = float((lego(updates([LowRank(*two) for two in map(best_four, noisy)])) - shared.dense()).norm())
    single = float((noisy[0].dense() - shared.dense()).norm())
    assert error < 0.5 * single


def noise(seed: int) -> LowRank:
    return factors(4, 200 + seed)


def best_four(update: LowRank) -> tuple[Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(update.dense())
    return u[:, :4] * s[:4], vh[:4]


def test_orthogonal_adapters_are_averaged_away() -> None:
    u, v = orthonormal(24, 8, 1), orthonormal(18, 8, 2)
    s = torch.tensor([8.0, 6.0, 4.0, 3.0], dtype=torch.float64)
    pair = [LowRank(u[:, i : i + 4] * s, v[:, i : i + 4].T) for i in (0, 4)]
    result = lego(updates(pair))
    for one in pair:
        cosine = float((result * one.dense()).sum() / result.norm() / one.norm())
        assert 0.2 < cosine < 0.8


def test_an_update_of_zero_is_left_out() -> None:
    zero = LowRank(torch.zeros(24, 6, dtype=torch.float64), factors(6, 9).A)
    three = replace(MIXED, items=(MIXED[0], MIXED[1], zero, MIXED[3]))
    same(lego(three), lego(taken(MIXED, [0, 1, 3])))
    assert not lego(updates([zero, zero])).any()


def test_single_precision_finds_the_same() -> None:
    single = mapped(MIXED, lambda u: u.to(torch.float32))
    same(lego(single).double(), lego(MIXED), 1e-4)


def test_copies_need_no_more_clusters_than_they_have_ranks() -> None:
    copies = updates([MIXED[2]] * 4)
    for clusters in (3, 5, 12):
        same(lego(copies, clusters=clusters), MIXED[2].dense())
