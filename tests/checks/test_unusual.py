"""What is unusual about an adapter: the spread of an update against a dense reference, planted spikes in a pool."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lora_cli.checks.spectra import AdapterSpread, Spread, measure, spread_of
from lora_cli.checks.unusual import FEWEST, compare
from lora_cli.errors import Refused
from lora_cli.formats.config import parse_config
from lora_cli.formats.header import read_header
from tests.adapters_on_disk import write_adapter
from tests.ordinary import Factors, ordinary, spiked

MODULE = "model.layers.0.self_attn.q_proj"


def dense(update: NDArray[np.float64], rank: int) -> Spread:
    """The definitions, written anew, from all singular values of the whole update."""
    s = np.linalg.svd(update, compute_uv=False)[: min(rank, *update.shape)]
    p = s**2 / np.sum(s**2)
    entropy = -sum(x * math.log(x) for x in p if x > 0) / math.log(len(p)) if len(p) > 1 else math.nan
    return Spread(float(np.sqrt(np.sum(update**2))), float(p[0]), entropy)


def spreads_of(factors: Factors) -> AdapterSpread:
    return {
        name: spread_of((b.T @ b)[None], (a @ a.T)[None], most=min(len(b), a.shape[1]))[0]
        for name, (b, a) in factors.items()
    }


def on_disk(folder: Path, shape: tuple[int, int], rank: int, dtype: torch.dtype, alpha: float = 8.0) -> AdapterSpread:
    g = torch.Generator().manual_seed(rank)
    b = (torch.randn(shape[0], rank, generator=g) * torch.logspace(0, -3, rank)).to(dtype)
    a = torch.randn(rank, shape[1], generator=g).to(dtype)
    write_adapter(folder, {MODULE: (b, a)}, r=rank, lora_alpha=alpha)
    config = parse_config((folder / "adapter_config.json").read_bytes())
    weights = folder / "adapter_model.safetensors"
    found = measure(weights, read_header(weights), config)
    want = dense(b.double().numpy() @ a.double().numpy() * (alpha / rank), rank)
    np.testing.assert_allclose(found[MODULE], want, rtol=1e-9, atol=1e-12)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "rank"), [((40, 24), 4), ((24, 40), 1), ((40, 24), 24), ((40, 6), 9), ((6, 40), 9)])
def test_the_spread_is_that_of_the_dense_update(
    tmp_path: Path, shape: tuple[int, int], rank: int, dtype: torch.dtype
) -> None:
    assert set(on_disk(tmp_path / "one", shape, rank, dtype)) == {MODULE}


def test_the_spread_does_not_depend_on_the_split_of_the_update_and_only_its_norm_on_the_scale() -> None:
    rng = np.random.default_rng(0)
    b, a, turn = rng.normal(size=(30, 8)), rng.normal(size=(8, 20)), rng.normal(size=(8, 8))
    one = spread_of((b.T @ b)[None], (a @ a.T)[None], most=20)[0]
    other_b, other_a = b @ turn, np.linalg.solve(turn, a)
    other = spread_of((other_b.T @ other_b)[None], (other_a @ other_a.T)[None], -3.0, most=20)[0]
    np.testing.assert_allclose(other, (3 * one.norm, one.concentration, one.entropy), rtol=1e-9)


def test_rank_one_has_no_entropy_and_an_update_of_zero_no_spread() -> None:
    one = spread_of(np.full((1, 1, 1), 4.0), np.full((1, 1, 1), 9.0), most=4)[0]
    assert (one.norm, one.concentration) == (6.0, 1.0)
    assert math.isnan(one.entropy)
    zero = spread_of(np.zeros((1, 3, 3)), np.eye(3)[None], most=4)[0]
    assert zero.norm == 0.0
    assert math.isnan(zero.concentration)
    assert math.isnan(zero.entropy)


def test_nan_is_refused_by_its_module(tmp_path: Path) -> None:
    write_adapter(tmp_path / "nan", {MODULE: (torch.full((4, 2), math.nan), torch.ones(2, 4))})
    weights = tmp_path / "nan" / "adapter_model.safetensors"
    with pytest.raises(Refused, match="NaN or Inf in model"):
        measure(weights, read_header(weights), parse_config((tmp_path / "nan" / "adapter_config.json").read_bytes()))


# Pools ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made() -> list[Factors]:
    return [ordinary(seed) for seed in range(200)]


@pytest.fixture(scope="module")
def pool(made: list[Factors]) -> list[AdapterSpread]:
    return [spreads_of(factors) for factors in made]


@pytest.mark.parametrize("place", [3, 57, 121, 188])
@pytest.mark.parametrize(("everywhere", "strength"), [(False, 30.0), (True, 100.0)])
@pytest.mark.parametrize("keep_norm", [False, True])
def test_a_planted_spike_ranks_first_among_200_ordinary_adapters(
    made: list[Factors], pool: list[AdapterSpread], place: int, everywhere: bool, strength: float, keep_norm: bool
) -> None:
    modules = list(made[place])
    target = modules if everywhere else [modules[place % len(modules)]]
    other = spreads_of(spiked(made[place], target, strength, seed=place, keep_norm=keep_norm))
    found = compare([*pool[:place], other, *pool[place + 1 :]])
    scores = [abs(one.z) if one else 0.0 for one in found]
    assert scores.index(max(scores)) == place
    worst = found[place]
    assert worst is not None
    assert not worst.low <= worst.value <= worst.high
    assert worst.module == ("" if everywhere else target[0])
    assert everywhere or worst.value == pytest.approx(getattr(other[target[0]], worst.statistic), rel=1e-6)


def test_a_pool_in_another_order_finds_the_same(pool: list[AdapterSpread]) -> None:
    assert compare(pool[::-1])[::-1] == compare(pool)


@pytest.mark.parametrize("size", [FEWEST, 40, 200])
def test_ordinary_adapters_lie_close_to_each_other_in_small_pools_too(pool: list[AdapterSpread], size: int) -> None:
    for start in range(0, len(pool), size):
        scores = [abs(one.z) for one in compare(pool[start : start + size]) if one is not None]
        assert len(scores) == size
        assert max(scores) < 7


def test_the_usual_range_is_where_z_is_at_most_three(pool: list[AdapterSpread]) -> None:
    for one in compare(pool):
        assert one is not None
        assert (abs(one.z) <= 3) == (one.low <= one.value <= one.high)


def test_adapters_that_are_all_alike_are_not_torn_apart_by_rounding() -> None:
    alike = {MODULE: Spread(1.0, 0.5, 0.5), "model.layers.1.self_attn.q_proj": Spread(2.0, 0.6, 0.4)}
    found = compare([alike] * FEWEST)
    assert all(one is not None and abs(one.z) < 1e-3 for one in found)


def test_an_adapter_that_changes_nothing_is_not_compared(pool: list[AdapterSpread]) -> None:
    nothing = {MODULE: Spread(0.0, math.nan, math.nan)}
    assert compare([*pool, nothing])[-1] is None
