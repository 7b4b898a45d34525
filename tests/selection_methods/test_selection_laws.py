"""Methods that read weights: each against dense float64, and the laws that hold for the whole folder."""

import weakref
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lora_cli.algebra import overlap
from lora_cli.algebra.lowrank import LowRank
from lora_cli.errors import Refused
from lora_cli.formats.reader import OpenAdapter, open_adapter
from lora_cli.formats.store import folder_ref, locate
from lora_cli.recipes import SELECTION_METHODS
from tests.adapters_on_disk import Factors, random_factors, write_adapter
from tests.dense_selection import ORACLES, UNRELATED, Dense

SHAPES = {"layers.0.q_proj": (24, 16), "layers.0.v_proj": (8, 16), "layers.1.up_proj": (40, 12)}
BY_SIZE = {"l2"}
"""The methods for which the size of an update matters."""
BLIND_TO_SIGN = {"abs", "quasi-fim"}
BY_WEIGHTS = sorted(name for name, one in SELECTION_METHODS.methods.items() if one.kind == "weights")
every_method = pytest.mark.parametrize("name", BY_WEIGHTS)


def dense(factors: Factors, scale: float = 1.0) -> Dense:
    return {module: scale * (b.double() @ a.double()) for module, (b, a) in factors.items()}


def opened(folder: Path) -> OpenAdapter:
    files = locate(folder_ref(folder))
    assert files is not None
    return open_adapter(files)


def written(folder: Path, factors: Factors, **config: object) -> OpenAdapter:
    return opened(write_adapter(folder, factors, **config))


def scores(name: str, candidates: list[OpenAdapter], target: OpenAdapter) -> list[float]:
    found: list[float] = SELECTION_METHODS.load(name)(candidates, target)
    return found


@pytest.fixture(scope="module")
def factors() -> Mapping[str, Factors]:
    """A target and candidates: near, opposite, unrelated, with fewer modules, with others, of zeros in one module."""
    target = random_factors(SHAPES, 3, seed=1)
    noise = random_factors(SHAPES, 3, seed=2)
    some, other = [*SHAPES][:2], [*SHAPES][1:]
    q = some[0]
    return {
        "target": target,
        "near": {m: (b + 0.3 * noise[m][0], a) for m, (b, a) in target.items()},
        "opposite": {m: (-b, a + 0.1 * noise[m][1]) for m, (b, a) in target.items()},
        "unrelated": random_factors(SHAPES, 5, seed=3),
        "fewer": {m: target[m] for m in some},
        "others": random_factors({m: SHAPES[m] for m in other} | {"layers.1.down_proj": (12, 40)}, 2, seed=4),
        "zero": {**noise, q: (torch.zeros_like(noise[q][0]), noise[q][1])},
    }


@pytest.fixture(scope="module")
def pool(factors: Mapping[str, Factors], tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, OpenAdapter]:
    folder = tmp_path_factory.mktemp("pool")
    return {name: written(folder / name, one) for name, one in factors.items()}


def candidates_of(pool: Mapping[str, OpenAdapter]) -> list[OpenAdapter]:
    return [adapter for name, adapter in pool.items() if name != "target"]


def test_every_method_that_reads_weights_has_its_oracle() -> None:
    assert sorted(ORACLES) == BY_WEIGHTS


@every_method
def test_a_method_gives_what_dense_float64_gives(
    name: str, factors: Mapping[str, Factors], pool: Mapping[str, OpenAdapter]
) -> None:
    expected = [ORACLES[name](dense(factors[one]), dense(factors["target"])) for one in factors]
    assert scores(name, [*pool.values()], pool["target"]) == pytest.approx(expected, rel=2e-6, abs=2e-6)


@every_method
def test_scores_do_not_depend_on_the_order_or_on_the_other_candidates(
    name: str, pool: Mapping[str, OpenAdapter]
) -> None:
    candidates = candidates_of(pool)
    found = scores(name, candidates, pool["target"])
    assert scores(name, candidates[::-1], pool["target"]) == found[::-1]
    assert [scores(name, [one], pool["target"])[0] for one in candidates] == found
    assert scores(name, [], pool["target"]) == []


@every_method
def test_an_adapter_equal_to_the_target_comes_first(
    name: str, pool: Mapping[str, OpenAdapter], factors: Mapping[str, Factors], tmp_path: Path
) -> None:
    twin = written(tmp_path / "twin", factors["target"])
    found = scores(name, [*candidates_of(pool), twin], pool["target"])
    assert found[-1] == pytest.approx(0 if name in BY_SIZE else 1, abs=1e-6)
    assert max(found[:-1]) < found[-1] - 1e-3


@every_method
def test_the_size_of_an_update_matters_to_distances_alone(
    name: str, pool: Mapping[str, OpenAdapter], factors: Mapping[str, Factors], tmp_path: Path
) -> None:
    usual = scores(name, [pool["unrelated"]], pool["target"])
    for size in (1e-18, 1e12):  # squares of the entries of the first are 0 in fp32
        scaled = written(tmp_path / f"{size}", factors["unrelated"], lora_alpha=5 * size)
        target = written(tmp_path / f"target{size}", factors["target"], lora_alpha=3 * size)
        if name in BY_SIZE:
            assert scores(name, [scaled], pool["target"])[0] != pytest.approx(usual[0], rel=0.01)
        else:
            assert scores(name, [scaled], pool["target"]) == pytest.approx(usual, rel=2e-6, abs=1e-9)
            assert scores(name, [scaled], target) == pytest.approx(usual, rel=2e-6, abs=1e-9)


@every_method
def test_the_split_of_an_update_into_factors_does_not_matter(
    name: str, pool: Mapping[str, OpenAdapter], factors: Mapping[str, Factors], tmp_path: Path
) -> None:
    usual = scores(name, [pool["near"]], pool["target"])
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64))[0]
    turned = {m: ((b.double() @ rotation).float(), (rotation.T @ a.double()).float()) for m, (b, a) in near(factors)}
    moved = {m: (b / 8, a) for m, (b, a) in near(factors)}
    wider = {m: (torch.cat([b, b], 1) / 2, torch.cat([a, a])) for m, (b, a) in near(factors)}
    others = [
        written(tmp_path / "turned", turned),
        written(tmp_path / "moved", moved, lora_alpha=24),
        written(tmp_path / "wider", wider),
    ]
    assert scores(name, others, pool["target"]) == pytest.approx(usual * 3, rel=2e-6)


def near(factors: Mapping[str, Factors]) -> list[tuple[str, tuple[Tensor, Tensor]]]:
    return [*factors["near"].items()]


@every_method
def test_the_opposite_of_the_target_comes_last_or_counts_as_the_target(
    name: str, pool: Mapping[str, OpenAdapter], factors: Mapping[str, Factors], tmp_path: Path
) -> None:
    negative = written(tmp_path / "negative", {m: (-b, a) for m, (b, a) in factors["target"].items()})
    found = scores(name, [pool["near"], negative], pool["target"])
    if name in BLIND_TO_SIGN:
        assert found[1] == pytest.approx(1, abs=1e-6)
    else:
        assert found[1] == pytest.approx(
            ORACLES[name](dense(factors["target"], -1), dense(factors["target"])), abs=1e-6
        )
        assert found[1] < found[0]


@pytest.mark.parametrize("name", sorted(UNRELATED))
def test_unrelated_updates_score_what_the_help_says(name: str, tmp_path: Path) -> None:
    one, other = (
        written(tmp_path / f"{seed}", random_factors({"layers.0.q_proj": (400, 96)}, 96, seed=seed)) for seed in (1, 2)
    )
    expected = UNRELATED[name]
    allowed = 0.02 if name != "clamp-pm" else 0.01
    assert scores(name, [one], other) == pytest.approx([expected], abs=allowed)


@every_method
def test_an_update_of_zeros_scores_nothing(
    name: str, pool: Mapping[str, OpenAdapter], factors: Mapping[str, Factors], tmp_path: Path
) -> None:
    nothing = written(tmp_path / "nothing", {m: (0 * b, a) for m, (b, a) in factors["target"].items()})
    if name not in BY_SIZE:
        assert scores(name, [nothing], pool["target"]) == [0.0]
        assert scores(name, [pool["near"]], nothing) == [0.0]
    else:
        assert scores(name, [nothing], nothing) == [0.0]
        assert scores(name, [nothing], pool["target"])[0] < 0


@every_method
def test_an_adapter_of_another_shape_is_refused_by_name(
    name: str, pool: Mapping[str, OpenAdapter], tmp_path: Path
) -> None:
    other = written(tmp_path / "other", random_factors({"layers.0.q_proj": (24, 32)}, 2, seed=1))
    with pytest.raises(Refused, match=r"other: layers\.0\.q_proj is 24×32 in it and 24×16 in the target"):
        scores(name, [pool["near"], other], pool["target"])


def test_a_few_updates_are_in_memory_however_many_candidates_there_are(
    pool: Mapping[str, OpenAdapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0
    usual = OpenAdapter.read

    def read(self: OpenAdapter, module: str, dtype: torch.dtype = torch.float32) -> LowRank:
        nonlocal most
        update = usual(self, module, dtype)
        alive.add(update.B)
        most = max(most, len(alive))
        return update

    monkeypatch.setattr(OpenAdapter, "read", read)
    for name in BY_WEIGHTS:
        scores(name, candidates_of(pool), pool["target"])
    # A candidate's and the target's, and those before them, which are let go once the next are read.
    assert most <= 4


@pytest.mark.parametrize("ranks", [(2, 3), (16, 16), (0, 4)])
def test_sums_of_entries_over_tiles_equal_those_of_dense_updates(
    ranks: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (LowRank(torch.randn(70, r, generator=generator), torch.randn(r, 50, generator=generator)) for r in ranks)
    monkeypatch.setattr(overlap, "_TILE", 350)
    entries = x.dense().double() * y.dense().double()
    assert overlap.absolute(x, y) == pytest.approx(float(entries.abs().sum()), rel=1e-5)
    assert overlap.agreeing(x, y) == pytest.approx(float(entries[entries > 0].sum()), rel=1e-5)
    assert overlap.squares(x, y) == pytest.approx(float(entries.square().sum()), rel=1e-5)
    assert overlap.squares(x, x) == pytest.approx(float(x.dense().double().pow(4).sum()), rel=1e-5)
