"""mergekit's methods on the same updates, where mergekit (0.1.5 or later) is installed; skipped elsewhere.

mergekit merges whole models: here its tensors are the updates themselves, with a base of zeros where it wants one. What
cannot be compared: mergekit's random numbers (della, dare_ties) are torch's, ours go by adapter and place; its della
rescales what is left to the former L1 norm, ours divides each entry by its own chance. Counts of entries are rounded
down there and to the nearest here, so densities are chosen that make them whole.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_cli.algebra.lowrank import LowRank
from lora_cli.algebra.updates import Updates
from lora_cli.merge_options import METHODS
from lora_cli.steps.merge.module import run_method

mergekit = pytest.importorskip("mergekit.merge_methods", exc_type=ImportError)
if not hasattr(mergekit, "merge_tensors"):
    pytest.skip("mergekit before 0.1.5 merges no tensors by themselves", allow_module_level=True)

OUT, IN = 20, 10


def updates(n: int, *, shared: float = 1.0) -> list[Tensor]:
    """Dense updates of rank 4 and different norms, with something in common."""
    g = torch.Generator().manual_seed(n)

    def factors() -> Tensor:
        b, a = (torch.randn(size, generator=g, dtype=torch.float64) for size in ((OUT, 4), (4, IN)))
        return b @ a

    common = shared * factors()
    return [(1 + 0.3 * i) * (common + factors()) for i in range(n)]


def ours(method: str, deltas: Sequence[Tensor], weights: Sequence[float], **knobs: Any) -> Tensor:
    items = tuple(LowRank(delta, torch.eye(IN, dtype=delta.dtype)) for delta in deltas)
    given = Updates(items, keys=tuple(range(len(items))), scales=(1.0,) * len(items))
    result = run_method(method, given, torch.tensor(weights, dtype=torch.float64), METHODS.check(method, knobs))
    return result if isinstance(result, Tensor) else result.dense()


def theirs(method: str, deltas: Sequence[Tensor], *, base: bool = False, **parameters: Any) -> Tensor:
    tensors = [*deltas, torch.zeros(OUT, IN, dtype=torch.float64)] if base else [*deltas]
    return mergekit.merge_tensors(tensors, method, parameters=parameters, base_index=len(deltas) if base else None)


def apart(actual: Tensor, wanted: Tensor) -> float:
    """Relative distance."""
    return float((actual - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("t", [0.0, 0.2, 0.5, 1.0])
def test_slerp_equals_mergekits(t: float) -> None:
    pair = updates(2)
    wanted = mergekit.merge_tensors(pair, "slerp", parameters={"t": t}, base_index=0)
    assert apart(ours("slerp", pair, [1 - t, t]), wanted) < 1e-12


def test_slerp_of_nearly_parallel_updates_differs_by_the_line_that_mergekit_takes() -> None:
    x, y = updates(2)
    pair = [x, x + 0.02 * y]
    wanted = mergekit.merge_tensors(pair, "slerp", parameters={"t": 0.5}, base_index=0)
    assert apart(ours("slerp", pair, [0.5, 0.5]), wanted) < 1.3e-4


@pytest.mark.parametrize(
    ("angles", "flags"),
    [
        ("whole", {"nuslerp_flatten": True}),
        ("row", {"nuslerp_flatten": False, "nuslerp_row_wise": False}),
        ("column", {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ],
)
def test_nuslerp_equals_mergekits_as_a_whole_by_row_and_by_column(angles: str, flags: dict[str, bool]) -> None:
    pair = updates(2)
    wanted = theirs("nuslerp", pair, weight=[0.7, 0.3], **flags)
    assert apart(ours("nuslerp", pair, [0.7, 0.3], angles=angles), wanted) < 1e-12


@pytest.mark.parametrize("weights", [[0.25] * 4, [0.1, 0.4, 0.3, 0.2]], ids=["equal", "mixed"])
def test_multislerp_equals_mergekits(weights: list[float]) -> None:
    deltas = updates(4)
    assert apart(ours("multislerp", deltas, weights), theirs("multislerp", deltas, weight=weights)) < 1e-7


@pytest.mark.parametrize(("settings", "tolerance"), [({}, 1e-4), ({"max_iter": 10000, "tol": 1e-12}, 1e-10)])
@pytest.mark.parametrize("shared", [1.0, 0.0], ids=["alike", "unrelated"])
def test_karcher_equals_mergekits_to_its_tolerance(settings: dict[str, Any], tolerance: float, shared: float) -> None:
    deltas = updates(5, shared=shared)
    assert apart(ours("karcher", deltas, [0.2] * 5), theirs("karcher", deltas, **settings)) < tolerance


@pytest.mark.parametrize("n", [2, 5])
def test_model_stock_equals_mergekits(n: int) -> None:
    deltas = updates(n)
    assert apart(ours("model-stock", deltas, [1 / n] * n), theirs("model_stock", deltas, base=True)) < 1e-12


def test_linear_equals_mergekits_task_arithmetic() -> None:
    deltas, weights = updates(3), [0.7, -0.4, 1.1]
    wanted = theirs("task_arithmetic", deltas, base=True, weight=weights)
    assert apart(ours("linear", deltas, weights), wanted) < 1e-12


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_equals_mergekits(density: float) -> None:
    deltas, weights = updates(3), [0.7, 0.4, 1.1]
    wanted = theirs("ties", deltas, base=True, weight=weights, density=density)
    assert apart(ours("ties", deltas, weights, density=density), wanted) < 1e-12


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_sce_equals_mergekits(density: float) -> None:
    deltas = updates(4)
    wanted = theirs("sce", deltas, base=True, select_topk=density)
    assert apart(ours("sce", deltas, [1.0] * 4, density=density), wanted) < 1e-12


@pytest.mark.parametrize(("density", "gamma"), [(0.2, 0.05), (0.5, 0.01), (0.9, 0.05), (1.0, 0.01)])
def test_breadcrumbs_equals_mergekits(density: float, gamma: float) -> None:
    deltas, weights = updates(3), [0.7, -0.4, 1.1]
    wanted = theirs("breadcrumbs", deltas, base=True, weight=weights, density=density, gamma=gamma)
    assert apart(ours("breadcrumbs", deltas, weights, density=density, gamma=gamma), wanted) < 1e-12


def test_della_that_drops_nothing_equals_mergekits() -> None:
    deltas, weights = updates(3), [0.7, 0.4, 1.1]
    wanted = theirs("della", deltas, base=True, weight=weights, density=1.0, epsilon=0.1)
    assert apart(ours("della", deltas, weights, density=1.0, epsilon=0.0), wanted) < 1e-12


def test_della_drops_with_the_same_chances() -> None:
    [delta] = updates(1)
    torch.manual_seed(0)
    runs, knobs = 400, {"density": 0.5, "epsilon": 0.4}
    kept = sum((ours("della", [delta], [1.0], seed=seed, **knobs) != 0).double() for seed in range(runs)) / runs
    wanted = sum((theirs("della", [delta], base=True, weight=[1.0], **knobs) != 0).double() for _ in range(runs)) / runs
    assert float((kept - wanted).abs().max()) < 5 * (0.5 / runs) ** 0.5
    assert float((kept - wanted).abs().mean()) < 0.03
