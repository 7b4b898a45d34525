"""Dense updates block by block: exact thresholds, and results that hang on neither blocks, workers nor numba."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numba
import numpy as np
import pytest
import torch
from torch import Tensor

from lora_cli.algebra import compiled, kernels
from lora_cli.algebra.draws import stream, uniform
from lora_cli.algebra.lowrank import LowRank, squared_norm
from lora_cli.algebra.tiles import Ballot, Block, DeltaTiles, Part, exact_threshold
from lora_cli.algebra.updates import Updates
from tests.dense_reference import draws


def update(out: int, inn: int, r: int, seed: int, dtype: torch.dtype = torch.float64) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(out, r, generator=g).to(dtype), torch.randn(r, inn, generator=g).to(dtype))


def updates(*items: LowRank) -> Updates:
    return Updates(items, keys=tuple(range(1, len(items) + 1)), scales=(1.0,) * len(items))


def tiled(of: Updates, workers: int, size: int | None = None) -> DeltaTiles:
    """Updates in blocks of at most `size` bytes."""
    with pytest.MonkeyPatch.context() as patched:
        if size is not None:
            patched.setattr("lora_cli.algebra.tiles._TILE_BYTES", {"cpu": size})
        return DeltaTiles(of, workers)


def kth(dense: Tensor, density: float) -> float:
    """By sorting everything; 0 where all entries are kept."""
    k = max(1, round(density * dense.numel()))
    return 0.0 if k == dense.numel() else float(np.sort(dense.abs().numpy(), axis=None)[-k])


@pytest.fixture(params=["numba", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(kernels, "COMPILED", request.param == "numba")
    return str(request.param)


def uneven(dtype: torch.dtype) -> LowRank:
    """Rows of very different size, where a sample says little."""
    u = update(700, 90, 3, 13, dtype)
    return LowRank(u.B * torch.logspace(-6, 6, 700, dtype=dtype)[:, None].flip(0), u.A)


def whole_numbers() -> LowRank:
    """Few different magnitudes, each many times, exact in every order of summation."""
    g = torch.Generator().manual_seed(3)
    return LowRank(
        torch.randint(-2, 3, (300, 2), generator=g).float(), torch.randint(-1, 2, (2, 200), generator=g).float()
    )


SHAPED: dict[str, Callable[[], LowRank]] = {
    "even": lambda: update(400, 150, 4, 1, torch.float32),
    "uneven": lambda: uneven(torch.float64),
    "ties": whole_numbers,
    "mostly zero": lambda: LowRank(update(400, 1, 5, 2).B * (torch.arange(400) < 40)[:, None], update(1, 150, 5, 3).A),
    "zero": lambda: LowRank(torch.zeros(300, 2), torch.ones(2, 200)),
    "constant": lambda: LowRank(torch.ones(300, 1), torch.full((1, 200), 0.5)),
    "tiny": lambda: update(3, 2, 1, 4),
    "rank 0": lambda: LowRank(torch.zeros(200, 0), torch.zeros(0, 200)),
}


@pytest.mark.slow
@pytest.mark.parametrize("density", [0.0001, 0.01, 0.2, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("shape", SHAPED)
def test_thresholds_are_those_of_a_full_sort(shape: str, density: float, way: str) -> None:
    u = SHAPED[shape]()
    dense = torch.cat([u.B[i : i + 7] @ u.A for i in range(0, u.shape[0], 7)])
    for workers in (1, 3):
        tiles = tiled(updates(u), workers, 7 * u.shape[1] * u.B.element_size())
        assert tiles.thresholds(density).tolist() == pytest.approx([kth(dense, density)], rel=1e-6)
        if way == "numba":
            [cut] = tiles.thresholds(density).tolist()
            kept = tiles.merge(lambda block, cut=cut: next(iter(block)).abs() >= cut)  # type: ignore[misc]
            k = max(1, round(density * dense.numel()))
            exactly = k if shape in ("even", "uneven", "tiny") else int((dense.abs() >= kth(dense, density)).sum())
            assert int(kept.sum()) == exactly


def test_a_bracket_that_misses_is_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    u = update(300, 200, 4, 1)
    asked = []

    def far_off(parts: list[Part], size: int, workers: int) -> Tensor:
        asked.append(size)
        return torch.linspace(1e-9, 2e-9, 5000, dtype=u.B.dtype)

    monkeypatch.setattr("lora_cli.algebra.tiles._sample", far_off)
    part = Part(u.shape, lambda: u)
    assert exact_threshold([part], 0.2) == pytest.approx(kth(u.dense(), 0.2), rel=1e-12)
    assert asked


def test_the_threshold_of_several_parts_is_that_of_all_their_entries() -> None:
    parts = [update(200, 150, 3, 1), update(90, 300, 3, 2), LowRank(update(64, 64, 3, 3).B * 9, update(64, 64, 3, 3).A)]
    together = torch.cat([u.dense().flatten() for u in parts])
    read: list[int] = []

    def reader(i: int) -> Callable[[], LowRank]:
        return lambda: (read.append(i), parts[i])[1]

    lazy = [Part(u.shape, reader(i)) for i, u in enumerate(parts)]
    assert read == []
    for workers in (1, 2):
        assert exact_threshold(lazy, 0.3, workers) == pytest.approx(kth(together, 0.3), rel=1e-12)


def ballot(election: str, cut: float) -> Callable[[Block], Tensor]:
    def rule(block: Block) -> Tensor:
        votes = Ballot(block, election)  # type: ignore[arg-type]
        for tile, drawn, weight in zip(block, block.uniform(5), (1.0, -0.5, 2.0, 0.25), strict=True):
            votes.cast(tile * (drawn < 0.8), weight, cut)
        return votes.mean()

    return rule


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("election", ["total", "frequency", "plain"])
def test_blocks_workers_and_numba_do_not_change_the_result(election: str, dtype: torch.dtype) -> None:
    four = updates(*(update(50, 40, r, r, dtype) for r in (2, 4, 3, 6)))
    row = 40 * four[0].B.element_size()
    results = [tiled(four, w, size).merge(ballot(election, 0.7)) for w in (1, 2, 5) for size in (16 * row, None)]
    kernels_before, kernels.COMPILED = kernels.COMPILED, False
    try:
        results.append(tiled(four, 1, 16 * row).merge(ballot(election, 0.7)))
    finally:
        kernels.COMPILED = kernels_before
    assert bool(results[0].any())
    for one, other in ((0, 2), (0, 4), (1, 3), (1, 5), (0, 6)):
        assert torch.equal(results[one], results[other])
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_a_block_reuses_its_memory_but_not_its_sums() -> None:
    three = updates(*(update(33, 20, r, r) for r in (2, 4, 3)))

    def summed(block: Block) -> Tensor:
        total = block.zeros()
        for tile in block:
            total.add_(tile)
        return total

    expected = sum(u.dense() for u in three)
    for tile_bytes in (1, 1000, 1 << 20):
        result = tiled(three, 1, tile_bytes).merge(summed)
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_each_gives_what_is_found_in_the_order_of_the_rows() -> None:
    tiles = tiled(updates(update(33, 20, 2, 1)), 3, 160)
    assert tiles.each(lambda block: block.rows.start) == list(range(33))


def test_the_torch_way_and_numba_agree_on_ranks_draws_and_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    tile = update(30, 41, 2, 3, torch.float32).dense().round(decimals=0)
    tile[3] = 0

    def found() -> Iterator[Any]:
        yield kernels.mean_ranks(tile)
        yield kernels.mean_ranks(tile[:, :1])
        yield kernels.uniform(7, 2**32 - 1, 2**31 - 50, 1000)
        yield torch.tensor(kernels.squares(tile))
        yield torch.tensor(kernels.largest(tile.abs().flatten(), 100))

    compiled = list(found())
    monkeypatch.setattr(kernels, "COMPILED", False)
    for one, other in zip(compiled, found(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)
    assert compiled[0].min() >= 0
    assert compiled[0].max() <= 1
    torch.testing.assert_close(compiled[0].mean(1), torch.full((30,), 0.5), rtol=1e-5, atol=0)


def test_squared_norms_are_summed_in_double_precision() -> None:
    dense = torch.full((1000, 77), 0.1)
    dense[0, 0] = 1e4
    assert squared_norm(dense) == pytest.approx(float(dense.double().square().sum()), rel=1e-12)
    assert squared_norm(dense.T) == pytest.approx(squared_norm(dense), rel=1e-12)


def test_draws_are_the_written_down_generator() -> None:
    for seed, key in ((0, 1), (3, 2**63)):
        np.testing.assert_array_equal(uniform(seed, key, 0, 300).numpy(), draws(seed, key, 300))


def test_draws_do_not_hang_on_where_a_block_begins() -> None:
    whole = uniform(0, 5, 0, 10_000)
    assert torch.equal(torch.cat([uniform(0, 5, 0, 7), uniform(0, 5, 7, 9_993)]), whole)


def test_draws_are_uniform_and_independent() -> None:
    n = 1 << 18
    streams = [uniform(seed, key, 0, n).double() for seed, key in ((0, 1), (0, 2), (1, 1), (0, 2**40 + 1))]
    for numbers in streams:
        cells = torch.histc(numbers, 256, 0, 1)
        chi_squared = float(((cells - n / 256) ** 2 / (n / 256)).sum())
        assert 150 < chi_squared < 370  # 255 ± 5 standard deviations of 22.6
        for lag in (1, 2, 64, 4096):
            assert abs(float(torch.corrcoef(torch.stack([numbers[:-lag], numbers[lag:]]))[0, 1])) < 5 / n**0.5
    off_diagonal = torch.corrcoef(torch.stack(streams)) - torch.eye(4)
    assert float(off_diagonal.abs().max()) < 5 / n**0.5
    assert len({stream(seed, key) for seed in range(20) for key in range(20)}) == 400


def test_where_nothing_can_be_written_the_loops_are_compiled_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_ = numba.njit

    def no_place(**options: Any) -> Any:
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return compile_(**options)

    monkeypatch.setattr(numba, "njit", no_place)
    loop = compiled.loop(compiled.squares.py_func)  # type: ignore[attr-defined]
    assert loop(np.full(40, 2.0), np.zeros(compiled.GROUP)) == 160.0


@pytest.mark.slow
def test_numba_is_not_imported_before_it_is_needed() -> None:
    code = "import sys, lora_cli.steps.merge.stream; print('numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
