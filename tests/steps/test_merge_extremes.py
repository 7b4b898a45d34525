"""Merges at the ends of what numbers can hold: tiny, huge, cancelling, and modules of one row or column."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_cli.errors import Refused, UsageError
from lora_cli.merge_options import METHODS
from tests.adapters_on_disk import random_factors, write_adapter
from tests.cli import ok, refused
from tests.merge_methods.test_merge_laws import LAWS
from tests.steps.test_merge import close, deltas, merged

SHAPES = {"model.layers.0.self_attn.q_proj": (24, 18), "model.layers.1.mlp.down_proj": (12, 30)}
THIN = {"model.layers.0.self_attn.q_proj": (1, 18), "model.layers.1.mlp.down_proj": (12, 1), "model.score": (1, 1)}
WITHOUT_DATA = sorted(name for name, one in METHODS.methods.items() if not one.needs)
every_method = pytest.mark.parametrize("method", WITHOUT_DATA)


def pool(
    folder: Path, scale: float = 1.0, shapes: Mapping[str, tuple[int, int]] = SHAPES, n: int = 3, **config: Any
) -> list[Path]:
    """Adapters of rank 3 whose updates are those of the same seeds times `scale`."""
    made = []
    for seed in range(n):
        factors = {m: (b * scale, a) for m, (b, a) in random_factors(shapes, 3, seed=seed).items()}
        made.append(write_adapter(folder / f"{scale:g}-{len(shapes)}" / str(seed), factors, **config))
    return made


def case(
    method: str, folders: list[Path], weights: Sequence[float] = (0.5, 0.2, 0.3)
) -> tuple[list[Path], list[float]]:
    n = LAWS[method].takes or len(folders)
    return folders[:n], list(weights[:n])


def times(parts: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    return {module: delta * factor for module, delta in parts.items()}


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in WITHOUT_DATA if "seed" not in METHODS.get(name).knobs])
@pytest.mark.parametrize("scale", [1e-25, 1e12])
def test_updates_of_any_size_merge_alike(tmp_path: Path, method: str, scale: float) -> None:
    # Squares of 1e-25 vanish in float32; those of 1e12, times an energy of 1e24, overflow it.
    knobs = LAWS[method].knobs or {}
    merged(tmp_path / "one", *case(method, pool(tmp_path)), method=method, knobs=knobs)
    merged(tmp_path / "scaled", *case(method, pool(tmp_path, scale)), method=method, knobs=knobs)
    close(times(deltas(tmp_path / "scaled"), 1 / scale), deltas(tmp_path / "one"), 1e-4)


@every_method
def test_modules_of_one_row_or_column(tmp_path: Path, method: str) -> None:
    folders, weights = case(method, pool(tmp_path, shapes=THIN), [0.5, 0.2, -0.3])
    try:
        report = merged(tmp_path / "out", folders, weights, method=method, knobs=LAWS[method].knobs or {})
    except Refused:
        return  # two numbers of opposite sign lie on no arc
    found = deltas(tmp_path / "out")
    norm = sum(float(delta.square().sum()) for delta in found.values()) ** 0.5
    assert report.norm == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("method", [name for name in WITHOUT_DATA if METHODS.get(name).kind == "elementwise"])
def test_elementwise_methods_at_rank_one(tmp_path: Path, method: str) -> None:
    report = merged(tmp_path / "out", *case(method, pool(tmp_path)), method=method, rank="1")
    assert report.ranks == (1, 1)


@every_method
def test_weights_too_large_to_compute_with_are_refused(tmp_path: Path, method: str) -> None:
    folders, weights = case(method, pool(tmp_path), [1e38] * 3)
    with pytest.raises(Refused, match="too large to compute with"):
        merged(tmp_path / "out", folders, weights, method=method)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ties", "dare-ties", "della", "pico", "lego"])
@pytest.mark.parametrize("factor", [1e9, 1e-12])
def test_where_only_ratios_of_weights_count_their_size_does_not(tmp_path: Path, method: str, factor: float) -> None:
    folders = pool(tmp_path)
    merged(tmp_path / "one", folders, [0.5, 0.2, 0.3], method=method)
    merged(tmp_path / "many", folders, [0.5 * factor, 0.2 * factor, 0.3 * factor], method=method)
    close(deltas(tmp_path / "many"), deltas(tmp_path / "one"), 1e-5)


@pytest.mark.parametrize("options", [{}, {"norm_match": True}, {"dense": True, "norm_match": True}, {"method": "pico"}])
def test_what_rounding_leaves_of_a_cancelled_sum_is_not_written(tmp_path: Path, options: dict[str, Any]) -> None:
    factors = random_factors(SHAPES, 3, seed=1)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(2)))[0]
    one = write_adapter(tmp_path / "one", factors)
    same = write_adapter(tmp_path / "same", {m: (b @ turn, turn.T @ a) for m, (b, a) in factors.items()})
    with pytest.raises(Refused, match="the merged update is zero"):
        merged(tmp_path / "out", [one, same], [0.5, -0.5], **options)


def test_a_tiny_lambda_is_a_factor_and_no_cancellation(tmp_path: Path) -> None:
    folders = pool(tmp_path)
    merged(tmp_path / "one", folders, [1.0] * 3)
    merged(tmp_path / "tiny", folders, [1.0] * 3, lambda_=1e-9)
    close(times(deltas(tmp_path / "tiny"), 1e9), deltas(tmp_path / "one"), 1e-6)
    with pytest.raises(UsageError, match="--lambda 0 would erase"):
        merged(tmp_path / "none", folders, [1.0] * 3, lambda_=0.0)


def test_a_result_that_vanishes_in_its_precision_is_refused(tmp_path: Path) -> None:
    folders = pool(tmp_path)
    for dense in (False, True):
        with pytest.raises(Refused, match="underflows to zero in fp16"):
            merged(
                tmp_path / "out", folders, [1e-14] * 3, method="linear" if dense else "cat", dense=dense, dtype="fp16"
            )


def test_weights_of_any_size_are_spread_over_missing_modules(tmp_path: Path) -> None:
    folders = pool(tmp_path, n=2)
    lacking = {m: f for m, f in random_factors(SHAPES, 3, seed=7).items() if "down_proj" not in m}
    folders.append(write_adapter(tmp_path / "lacking", lacking))
    merged(tmp_path / "one", folders, [1.0] * 3, missing="renorm")
    merged(tmp_path / "tiny", folders, [1e-13] * 3, missing="renorm")
    close(times(deltas(tmp_path / "tiny"), 1e13), deltas(tmp_path / "one"), 1e-6)


def test_an_adapter_outside_the_scope_is_named(tmp_path: Path) -> None:
    folders = pool(tmp_path, n=2)
    lacking = {m: f for m, f in random_factors(SHAPES, 3, seed=7).items() if "down_proj" not in m}
    folders.append(write_adapter(tmp_path / "lacking", lacking))
    with pytest.raises(Refused, match="lacking: no module in the scope layers=1"):
        merged(tmp_path / "out", folders, [1.0] * 3, scope=["layers=1"])


def test_wudi_of_copies_is_as_exact_as_its_factors(tmp_path: Path) -> None:
    one = random_factors(SHAPES, 3, seed=1)
    folders = [write_adapter(tmp_path / str(i), one) for i in range(3)]
    merged(tmp_path / "out", folders, [1.0] * 3, method="wudi")
    close(deltas(tmp_path / "out"), deltas(folders[0]), 1e-6)


def test_a_lock_holds_for_what_is_there_already_and_for_no_other_adapters(own_home: Path) -> None:
    for seed, name in enumerate(("one", "two", "three")):
        write_adapter(own_home / name, random_factors(SHAPES, 2, seed=seed))
    ok("merge", "one", "two", "-o", "out")
    told = refused(5, "merge", "one", "two", "three", "--locked", "out/run.json", "-o", "again")
    assert "not among the adapters that were merged" in told
    assert "up to date" in ok("merge", "one", "two", "--locked", "out/run.json", "-o", "out").err
    with Path("out/adapter_model.safetensors").open("ab") as file:
        file.write(b" ")
    told = refused(1, "merge", "one", "two", "--locked", "out/run.json", "-o", "out")
    assert "out/adapter_model.safetensors has changed since it was written" in told


@pytest.mark.parametrize(
    ("words", "numbers"),
    [((), [0.5, 0.5]), (("--weights", "sum"), [1.0, 1.0]), (("--weights", "0.5,2,3"), [0.5, 3.0])],
)
def test_weights_are_those_of_the_adapters_that_dedupe_leaves(
    own_home: Path, words: tuple[str, ...], numbers: list[float]
) -> None:
    for seed, name in ((0, "a"), (0, "b"), (1, "c")):
        write_adapter(own_home / name, random_factors(SHAPES, 2, seed=seed))
    ok("merge", "a", "b", "c", "-m", "linear", "--dedupe", "0.99", *words, "-o", "out")
    settings = json.loads(Path("out/run.json").read_text())["settings"]
    assert sorted(settings["weights"].values()) == numbers


def test_a_device_without_float64_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="float64"):
        merged(tmp_path / "out", pool(tmp_path), [1.0] * 3, device="mps")
