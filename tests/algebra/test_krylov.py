"""The leading directions of dense updates: what they leave is as little as a dense SVD in float64 leaves."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lora_cli.algebra import lowrank
from lora_cli.algebra.krylov import Gains
from lora_cli.algebra.lowrank import LowRank, dense_svd
from lora_cli.algebra.tiles import DeltaTiles
from lora_cli.algebra.truncation import truncate
from lora_cli.algebra.updates import Updates
from lora_cli.merge_methods.ties import ties

SHAPE, RANK = (480, 640), 40


@pytest.fixture(params=["bfloat16", "float32"], autouse=True)
def searched_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Updates of any size are searched in this precision."""
    monkeypatch.setattr(lowrank, "_searched_in_bfloat16", lambda _: request.param == "bfloat16")
    return str(request.param)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def merged() -> Tensor:
    """TIES of unrelated adapters."""
    updates = tuple(LowRank(noise(SHAPE[0], 8, seed=i).float(), noise(8, SHAPE[1], seed=~i).float()) for i in range(12))
    tiles = DeltaTiles(Updates(updates, keys=tuple(range(12)), scales=(1.0,) * 12))
    return ties(tiles, torch.ones(12), density=0.2).double()


def with_values(kind: str) -> Tensor:
    """An update whose singular values are of a kind."""
    at = torch.arange(1, min(SHAPE) + 1, dtype=torch.float64)
    values = {
        "equal": torch.ones(len(at), dtype=torch.float64),
        "nearly equal": 1 + 1e-6 * noise(len(at)).sort(descending=True).values,
        "flat": 1 - 0.2 * at / len(at),
        "slow": at**-0.3,
        "trained": at**-0.7,
        "steep": torch.exp(-at / 20),
        "one spike": torch.where(at <= 1, 30.0, 1.0).double(),
        "steps": 0.8 ** ((at - 1) // 30),
        "spikes": torch.where(at <= RANK // 2, 5.0, 1.0).double(),
        "low": torch.where(at <= RANK // 2, 1.0, 1e-3 * at**-0.5),
    }[kind]
    u, v = (torch.linalg.qr(noise(side, len(at), seed=side))[0] for side in SHAPE)
    made: Tensor = (u * values) @ v.T
    return made


def of_kind(kind: str) -> Tensor:
    """An update (out, in) in float64."""
    product = noise(SHAPE[0], RANK // 2, seed=1) @ noise(RANK // 2, SHAPE[1], seed=2)
    made: dict[str, Callable[[], Tensor]] = {
        "TIES": merged,
        "noise": lambda: noise(*SHAPE),
        "signs": lambda: noise(*SHAPE).sign(),
        "heavy tails": lambda: noise(*SHAPE) ** 5,
        "unlike rows": lambda: noise(*SHAPE) * torch.exp(2 * noise(SHAPE[0], 1, seed=1)),
        # Some strong directions, fewer than are wanted, then noise: gains fall fast, and slowly from there on.
        "trimmed": lambda: product * (product.abs() > 6),
        "below noise": lambda: product / 4 + noise(*SHAPE),
    }
    return made[kind]() if kind in made else with_values(kind)


def left(delta: Tensor, factors: LowRank) -> float:
    return float(torch.linalg.norm(delta.double() - factors.B.double() @ factors.A.double()))


@pytest.mark.parametrize(
    "kind",
    [
        "TIES", "noise", "signs", "heavy tails", "unlike rows", "trimmed", "below noise", "equal", "nearly equal",
        "flat", "slow", "trained", "steep", "one spike", "steps", "spikes", "low",
    ],
)  # fmt: skip
@pytest.mark.parametrize("rank", [6, RANK])
def test_what_is_left_is_nearly_the_least(kind: str, rank: int) -> None:
    delta = of_kind(kind).float()
    best = float(torch.linalg.svdvals(delta.double())[rank:].square().sum().sqrt())
    for update in (delta, delta.T.contiguous()):
        found = dense_svd(update, rank)
        assert left(update, found.truncated(rank)) <= 1.001 * best
        for directions in (found.U, found.V):
            assert (directions.T @ directions - torch.eye(rank)).abs().max() < 1e-5
    assert left(delta, truncate(delta, rank).at(rank)) <= 1.001 * best


@pytest.mark.parametrize("size", [1e-30, 1e-9, 1e9, 1e30])
@pytest.mark.parametrize("kind", ["TIES", "trained"])
def test_what_is_left_does_not_depend_on_the_scale(kind: str, size: float) -> None:
    delta = of_kind(kind).float()
    delta /= delta.norm()
    plain = left(delta, dense_svd(delta, RANK).truncated(RANK))
    sized = dense_svd(delta * size, RANK).truncated(RANK)
    root = LowRank(sized.B.double() / size**0.5, sized.A.double() / size**0.5)
    assert left(delta, root) == pytest.approx(plain, rel=1e-4)


def test_steep_spectra_are_never_left_to_bfloat16(searched_in: str) -> None:
    delta = of_kind("steep").float()
    values = torch.linalg.svdvals(delta.double())[:RANK]
    torch.testing.assert_close(dense_svd(delta, RANK).s.double(), values, rtol=1e-5, atol=0)


def test_one_fast_step_does_not_end_the_search() -> None:
    # What 80, 160, 240 and 320 directions leave of a trimmed product of 40 ranks, 64 wanted, beside the least.
    gains = Gains()
    assert [gains.enough(left) for left in (1.61, 1.011, 1.0037, 1.0011)] == [False] * 4
    steep = Gains()
    assert [steep.enough(left) for left in (1.7, 1.024, 1.00063, 1.000004)] == [False, False, False, True]
