"""Elementwise methods beyond the laws: PEFT as a second opinion, expectations over seeds, the borders of knobs."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils import merge_utils
from torch import Tensor

from lora_cli.algebra.lowrank import LowRank
from lora_cli.algebra.updates import Updates
from lora_cli.errors import UsageError
from lora_cli.merge_options import METHODS
from lora_cli.steps.merge.module import run_method
from tests import dense_reference
from tests.adapters_on_disk import random_factors, write_adapter
from tests.dense_reference import Case
from tests.steps.test_merge import close, deltas, merged

SHAPES = {"layers.0.q_proj": (40, 24), "layers.0.v_proj": (16, 24), "layers.1.q_proj": (40, 24)}


def some(n: int, out: int = 60, inn: int = 50, dtype: torch.dtype = torch.float32) -> Updates:
    g = torch.Generator().manual_seed(n)
    items = [
        LowRank(torch.randn(out, 4, generator=g).to(dtype), torch.randn(4, inn, generator=g).to(dtype))
        for _ in range(n)
    ]
    return Updates(tuple(items), keys=tuple(range(n)), scales=(1.0,) * n)


def run(name: str, updates: Updates, weights: list[float] | None = None, **knobs: Any) -> Tensor:
    w = torch.tensor(weights or [1.0] * len(updates), dtype=torch.float64)
    result = run_method(name, updates, w, METHODS.check(name, knobs))
    return result if isinstance(result, Tensor) else result.dense()


@pytest.mark.parametrize("election", ["total", "frequency"])
@pytest.mark.parametrize(("n", "density"), [(3, 0.2), (5, 0.5), (7, 0.05)])
def test_ties_is_that_of_peft_on_deltas_where_nothing_ties(n: int, density: float, election: str) -> None:
    updates = some(n)
    ours = run("ties", updates, density=density, election=election)
    theirs = merge_utils.ties([u.dense() for u in updates], torch.ones(n), density, election)
    if election == "frequency":  # votes that cancel elect + there, nothing here
        kept = torch.stack([merge_utils.prune(u.dense(), density, "magnitude").sign() for u in updates])
        tied = kept.sum(0) == 0
        assert not ours[tied].any()
        ours, theirs = ours[~tied], theirs[~tied]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dare", "rank-dare"])
def test_the_mean_over_seeds_is_the_weighted_sum(name: str) -> None:
    updates = some(3, 12, 10, torch.float64)
    weights = [1.0, -0.5, 2.0]
    exact = run("linear", updates, weights)
    seeds = 400
    samples = torch.stack([run(name, updates, weights, density=0.5, seed=seed) for seed in range(seeds)])
    error = (samples.mean(0) - exact) / (samples.std(0) / seeds**0.5)
    assert float(error.abs().max()) < 4.5
    assert not torch.equal(samples[0], samples[1])


def test_dare_keeps_about_its_share_and_rescales_it() -> None:
    [u] = some(1, 200, 200)
    result = run("dare", some(1, 200, 200), density=0.3)
    kept = result != 0
    assert float(kept.float().mean()) == pytest.approx(0.3, abs=0.01)
    torch.testing.assert_close(result[kept], u.dense()[kept] / 0.3, rtol=1e-5, atol=1e-6)


def test_adapters_of_one_module_do_not_share_their_draws() -> None:
    a, b = (run("dare", Updates(some(1).items, (key,), (1.0,))) for key in (1, 2))
    assert not torch.equal(a != 0, b != 0)


def test_della_without_epsilon_is_dare_ties_and_with_it_keeps_more_of_the_large() -> None:
    updates = some(4)
    torch.testing.assert_close(run("della", updates, epsilon=0.0), run("dare-ties", updates))
    [u] = some(1, 300, 200)
    kept = run("della", some(1, 300, 200), density=0.5, epsilon=0.4) != 0
    order = u.dense().abs().argsort(dim=1)
    share = kept.gather(1, order).float().mean(0)
    assert float(share[:20].mean()) == pytest.approx(0.14, abs=0.03)
    assert float(share[-20:].mean()) == pytest.approx(0.86, abs=0.03)


@pytest.mark.parametrize("knobs", [{"density": 0.1}, {"density": 0.95}, {"density": 0.4, "epsilon": 0.45}])
def test_della_refuses_chances_outside_of_what_is_possible(knobs: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="leaves"):
        run("della", some(2), **knobs)


def test_breadcrumbs_without_gamma_is_the_sum_of_trimmed_updates() -> None:
    updates = some(3)
    trimmed = sum(merge_utils.prune(u.dense(), 0.2, "magnitude") for u in updates)
    torch.testing.assert_close(run("breadcrumbs", updates, gamma=0.0), trimmed, rtol=1e-5, atol=1e-6)


def test_breadcrumbs_drops_the_largest() -> None:
    [u] = some(1)
    result = run("breadcrumbs", some(1), density=0.3, gamma=0.1)
    size = u.dense().abs().flatten().sort(descending=True).values
    assert float(result.abs().max()) == pytest.approx(float(size[300]), rel=1e-6)
    assert int((result != 0).sum()) == 900


def test_sce_gives_the_larger_adapter_the_larger_say() -> None:
    small, large = some(2)
    pair = Updates((small, large.scaled(10.0)), (1, 2), (1.0, 1.0))
    result = run("sce", pair, density=1.0)
    larger = large.scaled(10.0).dense()
    assert float(torch.nn.functional.cosine_similarity(result.flatten(), larger.flatten(), dim=0)) > 0.99


@pytest.mark.parametrize("name", ["ties", "dare", "dare-ties", "della", "breadcrumbs", "sce", "rank-dare"])
@pytest.mark.parametrize(("out", "inn"), [(1, 1), (5, 1), (1, 5), (3, 2)])
def test_the_smallest_modules_merge(name: str, out: int, inn: int) -> None:
    assert run(name, some(2, out, inn, torch.float64)).shape == (out, inn)


@pytest.mark.parametrize("name", ["ties", "dare", "dare-ties", "della", "breadcrumbs", "sce", "rank-dare"])
def test_updates_of_zero_merge_to_zero(name: str) -> None:
    nothing = LowRank(torch.zeros(6, 2), torch.ones(2, 5))
    assert not run(name, Updates((nothing, nothing), (1, 2), (1.0, 1.0))).any()


@pytest.mark.parametrize(
    ("method", "knobs"), [("ties", {"density": 0.3}), ("breadcrumbs", {"density": 0.3, "gamma": 0.05})]
)
def test_thresholds_of_whole_adapters_rank_the_entries_of_all_modules(
    tmp_path: Path, method: str, knobs: dict[str, float]
) -> None:
    one = random_factors(SHAPES, 4, seed=1)
    one["layers.0.v_proj"] = (one["layers.0.v_proj"][0] * 20, one["layers.0.v_proj"][1])  # most of the largest are here
    two = random_factors({name: SHAPES[name] for name in list(SHAPES)[::2]}, 4, seed=2)
    folders = [write_adapter(tmp_path / "one", one), write_adapter(tmp_path / "two", two)]
    out = tmp_path / "merged"
    merged(out, folders, [1.0, 0.5], method=method, knobs={**knobs, "per": "adapter"}, rank="24")
    parents = [deltas(folder) for folder in folders]
    expected = {}
    for module in SHAPES:
        kept = []
        present = [(parent, weight) for parent, weight in zip(parents, [1.0, 0.5], strict=True) if module in parent]
        for parent, _ in present:
            kept.append(trimmed_over_all(parent, module, knobs))
        weights = [weight for _, weight in present]
        if method == "ties":
            dense = dense_reference.disjoint_mean([k.numpy() for k in kept], weights, "total")
            expected[module] = torch.from_numpy(dense)
        else:
            expected[module] = sum(w * k for w, k in zip(weights, kept, strict=True))
    close(deltas(out), expected)
    per_module = tmp_path / "per_module"
    merged(per_module, folders, [1.0, 0.5], method=method, knobs=knobs, rank="24")
    assert (
        hashlib.sha256((per_module / "adapter_model.safetensors").read_bytes()).digest()
        != hashlib.sha256((out / "adapter_model.safetensors").read_bytes()).digest()
    )


def trimmed_over_all(parent: dict[str, Tensor], module: str, knobs: dict[str, float]) -> Tensor:
    sizes = torch.cat([delta.abs().flatten() for delta in parent.values()]).sort(descending=True).values
    gamma = knobs.get("gamma", 0.0)
    size, delta = parent[module].abs(), parent[module]
    kept = size >= sizes[round((knobs["density"] + gamma) * len(sizes)) - 1] * (1 - 1e-6)
    if gamma:
        kept &= size < sizes[round(gamma * len(sizes)) - 1] * (1 - 1e-6)
    return torch.where(kept, delta, 0)


def test_references_and_methods_meet_in_single_precision() -> None:
    updates = some(5)
    case = Case([(u.B.double().numpy(), u.A.double().numpy()) for u in updates], [1.0] * 5, keys=list(updates.keys))
    for name in ("dare", "breadcrumbs", "rank-dare"):
        expected = torch.from_numpy(getattr(dense_reference, name.replace("-", "_"))(case))
        torch.testing.assert_close(run(name, updates).double(), expected, rtol=1e-3, atol=1e-4)
