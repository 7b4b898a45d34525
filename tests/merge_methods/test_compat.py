"""PEFT as the oracle: of what it does to A and B apart, and of what it does to the updates where it is right."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_cli.algebra.draws import uniform
from lora_cli.algebra.lowrank import LowRank
from lora_cli.algebra.updates import Updates
from lora_cli.errors import Refused
from lora_cli.steps.merge.module import run_method
from tests.adapters_on_disk import random_factors, write_adapter
from tests.steps.test_merge import SHAPES, WILD, Q, close, deltas, in_peft, merged, needs_wild

TRIMMED = {"density": 0.3}
COMBINATIONS: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}),
    ("magnitude_prune", TRIMMED),
    ("ties", TRIMMED),
    ("ties", {"density": 0.7, "election": "frequency"}),
    ("dare_linear", {"density": 1.0}),
    ("dare_ties", {"density": 1.0}),
    ("dare_ties", {"density": 1.0, "election": "frequency"}),
]
every_combination = pytest.mark.parametrize(("combination", "knobs"), COMBINATIONS)
GROUPS = {
    "justbautista": [
        "justbautista__fine-tuning__emotion_lora_model",
        "justbautista__fine-tuning__keywords_lora_model",
        "justbautista__fine-tuning__therapist_lora_model",
    ],
    "gemma": [
        "0112LY__logo-gemma-lora__adapter",
        "ao-wei__gemma3-270m-svg-lora-partb__adapter",
        "ao-wei__gemma3-270m-svg-lora-partb__adapter_seed123",
        "zouhe0__LLM-Homework__adapter",
    ],
}


@pytest.fixture
def pool(tmp_path: Path) -> list[Path]:
    """Four adapters of rank 4 with different scales, one of them without the MLP, one with the scale of rslora."""
    return [
        write_adapter(tmp_path / "two", random_factors(SHAPES, 4, seed=1), lora_alpha=8),
        write_adapter(tmp_path / "third", random_factors(Q, 4, seed=2), lora_alpha=1.3),
        write_adapter(tmp_path / "root", random_factors(SHAPES, 4, seed=3), lora_alpha=3, use_rslora=True),
        write_adapter(tmp_path / "one", random_factors(SHAPES, 4, seed=4), lora_alpha=4),
    ]


def as_in_peft(knobs: dict[str, Any]) -> dict[str, Any]:
    return {"majority_sign_method" if name == "election" else name: value for name, value in knobs.items()}


def method_of(combination: str) -> str:
    return f"peft-{combination.replace('_', '-')}"


@pytest.mark.slow
@every_combination
@pytest.mark.parametrize("weights", [[1.0] * 4, [0.5, 2.0, 0.1, 1.0], [0.7, -0.4, 1.0, -1.5]], ids=str)
def test_random_adapters_come_out_as_in_peft(
    pool: list[Path], tmp_path: Path, combination: str, knobs: dict[str, Any], weights: list[float]
) -> None:
    merged(tmp_path / "out", pool, weights, method=method_of(combination), knobs=knobs)
    close(deltas(tmp_path / "out"), in_peft(pool, weights, combination, **as_in_peft(knobs)), 1e-6)


def some_modules(folder: Path, names: Sequence[str], layers: int, out: Path) -> Path:
    """A real adapter with the modules called `names` of its first layers only."""
    out.mkdir()
    shutil.copy(folder / "adapter_config.json", out)
    tensors = load_file(folder / "adapter_model.safetensors")
    parts = {name: name.split(".") for name in tensors}
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if set(parts[name]) & set(names) and int(next(p for p in parts[name] if p.isdecimal())) < layers
    }
    save_file(kept, out / "adapter_model.safetensors")
    return out


@pytest.fixture
def real(request: pytest.FixtureRequest, tmp_path: Path) -> list[Path]:
    """The first layers of one of GROUPS: all of one rank, of different scales and modules."""
    return [some_modules(WILD / name, ("k_proj", "v_proj"), 2, tmp_path / name) for name in GROUPS[request.param]]


@needs_wild
@pytest.mark.parametrize(("combination", "knobs"), COMBINATIONS[:3])
@pytest.mark.parametrize("real", GROUPS, indirect=True)
def test_real_adapters_come_out_as_in_peft(
    real: list[Path], tmp_path: Path, combination: str, knobs: dict[str, Any]
) -> None:
    weights = [0.7, -0.4, 1.0, 0.25][: len(real)]
    merged(tmp_path / "out", real, weights, method=method_of(combination), knobs=knobs)
    close(deltas(tmp_path / "out"), in_peft(real, weights, combination, **as_in_peft(knobs)), 1e-6)


@pytest.mark.parametrize("combination", ["dare_linear", "dare_ties"])
def test_given_the_same_mask_dare_is_that_of_peft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, combination: str
) -> None:
    module, density, seed, keys, weights = "model.layers.0.self_attn.q_proj", 0.4, 7, (21, 22, 23), [0.7, -0.4, 1.0]
    parts = [random_factors({module: (48, 32)}, 4, seed=key) for key in keys]
    folders = [write_adapter(tmp_path / str(i), part, lora_alpha=8) for i, part in enumerate(parts)]
    factors = [part[module] for part in parts]
    updates = Updates(tuple(LowRank(2 * b, a) for b, a in factors), keys=keys, scales=(2.0,) * 3)

    drawn = [uniform(seed, key, 0, 4 * (32 + 48)) < density for key in keys]
    masks = [*(m[: 4 * 32].view(4, 32) for m in drawn), *(m[4 * 32 :].view(48, 4) for m in drawn)]
    monkeypatch.setattr(torch, "bernoulli", lambda chances: masks.pop(0).to(chances))
    wanted = in_peft(folders, weights, combination, density=density)

    knobs = {"density": density, "seed": seed} | ({"election": "total"} if combination == "dare_ties" else {})
    result = run_method(method_of(combination), updates, torch.tensor(weights, dtype=torch.float64), knobs)
    assert masks == []
    close({module: result.dense().double()}, wanted, 1e-6)


def test_the_seed_decides_what_dare_drops(pool: list[Path], tmp_path: Path) -> None:
    found = {}
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        options = {"method": "peft-dare-linear", "knobs": {"density": 0.5, "seed": seed}}
        merged(tmp_path / name / "out", pool if name == "one" else pool[::-1], [1.0] * 4, **options)
        found[name] = (tmp_path / name / "out" / "adapter_model.safetensors").read_bytes()
    assert found["one"] == found["again"] != found["other"]


def test_the_result_has_the_rank_of_its_parents_and_scale_one(pool: list[Path], tmp_path: Path) -> None:
    report = merged(tmp_path / "out", pool, [1.0] * 4, method="peft-ties")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert report.ranks == (4, 4)
    assert (config["r"], config["lora_alpha"], config.get("use_rslora", False)) == (4, 4, False)
    close(in_peft([tmp_path / "out"], [1.0]), deltas(tmp_path / "out"), 1e-7)


@every_combination
def test_unequal_ranks_are_refused_and_another_method_named(
    pool: list[Path], tmp_path: Path, combination: str, knobs: dict[str, Any]
) -> None:
    higher = write_adapter(tmp_path / "higher", random_factors(SHAPES, 6, seed=5))
    with pytest.raises(Refused, match="all ranks must be equal; here are 4, 6") as caught:
        merged(tmp_path / "out", [pool[0], higher], [1.0, 1.0], method=method_of(combination), knobs=knobs)
    assert f"--method {'ties' if 'ties' in combination else 'linear'} " in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_a_scale_of_zero_hides_b_and_is_refused(pool: list[Path], tmp_path: Path) -> None:
    patterns = {"alpha_pattern": {"model.layers.0.mlp.down_proj": 0}}
    partly = write_adapter(tmp_path / "partly", random_factors(SHAPES, 4, seed=5), **patterns)
    with pytest.raises(Refused, match="scale, which is 0"):
        merged(tmp_path / "out", [pool[0], partly], [1.0, 1.0], method="peft-ties")


def test_turning_the_ranks_of_one_adapter_changes_what_peft_makes_of_it() -> None:
    b, a = torch.randn(2, 24, 3, generator=torch.Generator().manual_seed(1)), torch.randn(2, 3, 18)
    straight = Updates((LowRank(b[0], a[0]), LowRank(b[1], a[1])), keys=(1, 2), scales=(1.0, 1.0))
    turned = replace(straight, items=(LowRank(-b[0], -a[0]), straight[1]))
    ones = torch.ones(2, dtype=torch.float64)
    one, other = (run_method("peft-linear", updates, ones, {}).dense() for updates in (straight, turned))
    assert float((one - other).norm()) > 0.5 * float(one.norm())


@pytest.mark.parametrize("weights", [[1.0] * 4, [0.7, -0.4, 1.0, -1.5]], ids=str)
def test_a_weighted_sum_is_pefts_svd_at_full_rank(pool: list[Path], tmp_path: Path, weights: list[float]) -> None:
    merged(tmp_path / "out", pool, weights, method="linear")
    close(deltas(tmp_path / "out"), in_peft(pool, weights, "svd", svd_rank=16, svd_full_matrices=False), 1e-5)


# PEFT elects plus where a vote is undecided, ties elects nothing: an odd number of votes by count never is.
@pytest.mark.parametrize(("election", "density"), [("total", 0.25), ("frequency", 1.0)])
def test_ties_is_pefts_ties_svd_where_weights_are_one(
    pool: list[Path], tmp_path: Path, election: str, density: float
) -> None:
    three = [pool[0], pool[2], pool[3]]
    knobs = {"density": density, "election": election}
    merged(tmp_path / "out", three, [1.0] * 3, method="ties", knobs=knobs, energy=1.0)
    wanted = in_peft(three, [1.0] * 3, "ties_svd", svd_rank=32, svd_full_matrices=False, **as_in_peft(knobs))
    close(deltas(tmp_path / "out"), wanted, 1e-5)


@pytest.mark.slow
@needs_wild
@pytest.mark.parametrize("group", GROUPS)
def test_real_adapters_merge_as_in_pefts_svd_ties_svd_and_magnitude_prune_svd(tmp_path: Path, group: str) -> None:
    folders = [some_modules(WILD / name, ("v_proj",), 2, tmp_path / name) for name in GROUPS[group]]
    weights, thin = [0.7, -0.4, 1.0, 0.25][: len(folders)], {"svd_rank": 256, "svd_full_matrices": False}
    merged(tmp_path / "linear", folders, weights, method="linear")
    close(deltas(tmp_path / "linear"), in_peft(folders, weights, "svd", **thin), 1e-5)
    # Of these adapters' entries the next to the border at this density is a millionth away: no rounding moves it over.
    density, ones = 0.31, [1.0] * len(folders)
    merged(tmp_path / "ties", folders, ones, method="ties", knobs={"density": density}, energy=1.0)
    close(deltas(tmp_path / "ties"), in_peft(folders, ones, "ties_svd", density=density, **thin), 1e-5)
    # Trimming without a drop of the largest, and a weighted sum.
    pruned = {"density": density, "gamma": 0.0}
    merged(tmp_path / "pruned", folders, weights, method="breadcrumbs", knobs=pruned, energy=1.0)
    close(deltas(tmp_path / "pruned"), in_peft(folders, weights, "magnitude_prune_svd", density=density, **thin), 1e-5)
