"""Merges that only weigh the updates: the norms and angles they promise, whole adapters, and what they refuse."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lora_cli.algebra.lowrank import LowRank
from lora_cli.algebra.updates import Updates
from lora_cli.errors import Refused
from lora_cli.merge_options import METHODS
from tests.adapters_on_disk import random_factors, write_adapter
from tests.cli import ok, refused
from tests.clock import least_cpu
from tests.dense_coefficients import RULES
from tests.merge_methods.test_merge_laws import IN, OUT, expected, factors, merged, same
from tests.steps.test_merge import SHAPES, close, deltas
from tests.steps.test_merge import merged as merged_folder

SPHERICAL = ("karcher", "multislerp")
ANY_NUMBER = ("karcher", "model-stock", "multislerp", "norm-matched")
every_rule = pytest.mark.parametrize("name", sorted(RULES))


def of(*deltas: Tensor) -> Updates:
    """Dense updates as a method is given them."""
    items = tuple(LowRank(delta, torch.eye(delta.shape[1], dtype=delta.dtype)) for delta in deltas)
    return Updates(items, keys=tuple(range(len(items))), scales=(1.0,) * len(items))


def axis(i: int, length: float = 1.0) -> Tensor:
    """The update with one entry: axes are orthogonal."""
    delta = torch.zeros(OUT * IN, dtype=torch.float64)
    delta[i] = length
    return delta.view(OUT, IN)


def alike(n: int, cosine: float) -> list[Tensor]:
    """n updates of norm 1 with the same cosine between every two."""
    return [cosine**0.5 * axis(0) + (1 - cosine) ** 0.5 * axis(1 + i) for i in range(n)]


def cluster(n: int, spread: float = 1.0) -> Updates:
    """Updates of different ranks and norms around one direction."""
    centre = factors(2, 99).dense()
    return of(*((1 + i) * (centre + spread * factors(1 + i % 3, i).dense()) for i in range(n)))


def norm(delta: Tensor) -> float:
    return float(delta.norm())


@pytest.mark.parametrize("name", ANY_NUMBER)
@pytest.mark.parametrize(
    ("weights", "spread"), [([0.5, 0.25, 0.25], 0.1), ([1.0, 1.0, 1.0], 0.5), ([0.9, -0.2, 0.3], 1.0)]
)
def test_updates_that_agree_equal_the_dense_reference(name: str, weights: list[float], spread: float) -> None:
    updates = cluster(3, spread)
    same(merged(name, updates, weights), expected(name, updates, weights))


@pytest.mark.parametrize("name", ["norm-matched", *SPHERICAL])
def test_unrelated_adapters_keep_their_mean_norm(name: str) -> None:
    updates = of(axis(0, 1.0), axis(1, 2.0), axis(2, 4.0))
    weights = [0.5, -0.25, 0.25]
    assert norm(merged(name, updates, weights)) == pytest.approx(0.5 + 0.5 + 1.0)
    assert norm(merged("linear", updates, weights)) < 1.3


@pytest.mark.parametrize("n", [2, 7])
def test_what_cancels_is_raised_no_more_than_what_is_orthogonal(n: int) -> None:
    x = factors(3, 1).dense()
    almost = [(-1) ** i * x + 1e-3 * axis(i) for i in range(n - n % 2)]
    weights = [1 / len(almost)] * len(almost)
    mean = merged("linear", of(*almost), weights)
    same(merged("norm-matched", of(*almost), weights), mean * len(almost) ** 0.5, 1e-5)


def test_norm_matched_leaves_copies_of_any_weights_to_the_sum() -> None:
    x = factors(3, 1).dense()
    same(merged("norm-matched", of(x, x, 2 * x), [0.2, 0.5, 0.1]), 0.9 * x)


@pytest.mark.parametrize("name", SPHERICAL)
def test_norms_do_not_turn_a_mean_of_directions(name: str) -> None:
    x, y = factors(2, 1).dense(), factors(2, 2).dense()
    one, other = (merged(name, of(x, scale * y), [0.5, 0.5]) for scale in (1.0, 50.0))
    same(other / norm(other), one / norm(one))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_karcher_of_two_is_slerp_at_the_mean_norm(share: float) -> None:
    x, y = factors(2, 1).dense(), factors(3, 2).dense()
    weights = [1 - share, share]
    length = weights[0] * norm(x) + weights[1] * norm(y)
    arc = merged("slerp", of(x / norm(x), y / norm(y)), weights)
    same(merged("karcher", of(x, y), weights), length * arc)


def test_karcher_stands_where_the_angles_balance() -> None:
    updates, weights = cluster(12), np.linspace(0.1, 1, 12)
    mean = merged("karcher", updates, [*weights]).numpy().ravel()
    units = np.array([u.dense().numpy().ravel() / norm(u.dense()) for u in updates])
    cosines = units @ mean / np.linalg.norm(mean)
    angles = np.arccos(cosines)
    pull = (weights * angles / np.sin(angles)) @ (units - cosines[:, None] * mean / np.linalg.norm(mean))
    assert np.linalg.norm(pull) < 1e-9


@pytest.mark.parametrize(
    ("n", "cosine", "share"), [(6, 5.8e-4, 0.0035), (30, 0.02, 0.38), (3, 0.5, 0.75), (2, 1.0, 1.0)]
)
def test_model_stock_draws_to_the_base_as_far_as_adapters_disagree(n: int, cosine: float, share: float) -> None:
    updates, weights = of(*alike(n, cosine)), [1 / n] * n
    ratio = norm(merged("model-stock", updates, weights)) / norm(merged("linear", updates, weights))
    assert ratio == pytest.approx(share, abs=5e-3)


def test_model_stock_keeps_nothing_of_updates_that_are_opposed() -> None:
    opposed = of(axis(0), axis(1) - 0.2 * axis(0))
    assert not merged("model-stock", opposed, [0.5, 0.5]).any()
    assert merged("model-stock", opposed, [0.5, -0.5]).any()


@pytest.mark.parametrize("name", ANY_NUMBER)
def test_an_update_of_zero_counts_as_absent(name: str) -> None:
    updates = cluster(3)
    zero = of(*(u.dense() for u in updates), torch.zeros(OUT, IN, dtype=torch.float64))
    same(merged(name, zero, [0.5, 0.3, 0.2, 0.7]), merged(name, updates, [0.5, 0.3, 0.2]))


@pytest.mark.parametrize("name", [*ANY_NUMBER, "slerp", "nuslerp"])
def test_nothing_but_zeros_gives_zeros(name: str) -> None:
    zero = torch.zeros(OUT, IN, dtype=torch.float64)
    assert not merged(name, of(zero, zero), [0.5, 0.5]).any()
    assert not merged(name, of(axis(0), axis(1)), [0.0, 0.0]).any()


@pytest.mark.parametrize("angles", ["row", "column"])
@pytest.mark.parametrize("weights", [[0.7, 0.3], [1.0, 1.0], [0.4, -0.6], [0.0, 1.0]], ids=str)
def test_nuslerp_turns_each_row_or_column_by_its_own_angle(angles: str, weights: list[float]) -> None:
    updates = of(factors(3, 1).dense(), factors(2, 2).dense())
    same(merged("nuslerp", updates, weights, angles=angles), expected("nuslerp", updates, weights, angles=angles))


def test_nuslerp_takes_rows_without_an_angle_along_the_line() -> None:
    x, y = factors(3, 1).dense(), factors(3, 2).dense()
    y[0], y[1], y[2], x[3] = x[0], -2 * x[1], 0, 0
    rows = merged("nuslerp", of(x, y), [0.7, 0.3], angles="row")
    same(rows[:4], (0.7 * x + 0.3 * y)[:4])
    same(merged("nuslerp", of(x.T, y.T), [0.7, 0.3], angles="column"), rows.T)


@pytest.mark.parametrize("name", ["slerp", "nuslerp"])
def test_a_module_that_one_of_two_lacks_has_half_of_the_other(name: str) -> None:
    same(merged(name, of(axis(0, 3.0)), [0.5]), axis(0, 1.5))


@pytest.mark.parametrize("name", ["slerp", "nuslerp"])
def test_nearly_parallel_updates_join_the_line_without_a_jump(name: str) -> None:
    x = factors(3, 1).dense()
    for far in (1e-3, 1e-5, 1e-7, 1e-9):
        updates = of(x, x + far * axis(0))
        same(merged(name, updates, [0.6, 0.4]), merged("linear", updates, [0.6, 0.4]), max(1e-9, far))


@pytest.mark.parametrize("name", ["slerp", "nuslerp"])
def test_opposite_updates_have_no_arc(name: str) -> None:
    x = factors(3, 1).dense()
    opposed = of(x, -2 * x)
    with pytest.raises(Refused, match="opposite"):
        merged(name, opposed, [0.7, 0.3])
    same(merged(name, opposed, [0.0, 1.0]), -2 * x)
    same(merged(name, opposed, [0.5, -0.5]), 1.5 * x)


@pytest.mark.parametrize("name", ["slerp", "nuslerp"])
def test_an_arc_has_two_ends(name: str) -> None:
    with pytest.raises(Refused, match="two adapters, not 3"):
        merged(name, cluster(3), [1.0] * 3)


@pytest.mark.parametrize("name", SPHERICAL)
def test_directions_that_cancel_have_no_mean(name: str) -> None:
    x, y = factors(2, 1).dense(), factors(2, 2).dense()
    with pytest.raises(Refused, match="cancel"):
        merged(name, of(x, y, -3 * x, -2 * y), [0.25] * 4)


def test_karcher_refuses_what_lies_opposite_to_the_mean() -> None:
    with pytest.raises(Refused, match="points away from the mean"):
        merged("karcher", of(axis(0), axis(0, -1.0)), [0.9, 0.1])


# One thread: the others would wait for each other in a loop, which is CPU time where other tests run beside this one.
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ANY_NUMBER)
def test_a_thousand_adapters_take_no_time(name: str) -> None:
    g = torch.Generator().manual_seed(0)
    b, a = (torch.randn(1000, 40, generator=g, dtype=torch.float64) for _ in "ba")
    items = tuple(LowRank(x[:, None], y[None]) for x, y in zip(b, a, strict=True))
    updates = Updates(items, keys=(0,) * 1000, scales=(1.0,) * 1000)
    weights = torch.rand(1000, generator=g, dtype=torch.float64)
    found: list[Tensor] = []
    assert least_cpu(lambda: found.append(METHODS.load(name)(updates, weights)), 5.0) < 5
    c = found[0]
    products = (b @ b.T) * (a @ a.T)
    if name != "model-stock":
        mean_norm = float(weights @ products.diagonal().sqrt())
        assert float(c @ products @ c) ** 0.5 == pytest.approx(mean_norm, rel=0.1)


@pytest.fixture
def pool(own_home: Path) -> Path:
    """Three adapters that share half of their ranks, of different norms; the second has only some of the modules."""
    some = {name: shape for name, shape in SHAPES.items() if "q_proj" in name}
    shared = random_factors(SHAPES, 2, seed=9)
    for i, (name, shapes) in enumerate({"one": SHAPES, "two": some, "three": SHAPES}.items()):
        own = random_factors(shapes, 1 + i, seed=i)
        both = {
            module: (torch.cat([shared[module][0], b], dim=1), torch.cat([shared[module][1], a]))
            for module, (b, a) in own.items()
        }
        write_adapter(own_home / name, both, lora_alpha=2 * (1 + i))
    return own_home


def spread_out(folder: Path) -> np.ndarray:
    """All modules of an adapter side by side, those that it lacks as zeros."""
    found = deltas(folder)
    empty = {module: torch.zeros(shape, dtype=torch.float64) for module, shape in SHAPES.items()}
    return torch.cat([(found.get(module, empty[module])).flatten() for module in SHAPES]).numpy()


def cut(vector: np.ndarray) -> dict[str, Tensor]:
    """The modules of what `spread_out` gave."""
    parts = torch.from_numpy(vector).split([a * b for a, b in SHAPES.values()])
    return {module: part.view(shape) for (module, shape), part in zip(SHAPES.items(), parts, strict=True)}


@every_rule
@pytest.mark.parametrize("per", ["module", "adapter"])
def test_modules_are_measured_one_by_one_or_as_one_adapter(name: str, per: str, pool: Path) -> None:
    names, weights = (["one", "two"], [0.7, 0.3]) if name == "slerp" else (["one", "two", "three"], [0.5, 0.3, 0.2])
    folders = [pool / n for n in names]
    merged_folder(pool / "out", folders, weights, method=name, knobs={"per": per}, rank="sum")
    wanted = {}
    for module in SHAPES:
        held = [(folder, w) for folder, w in zip(folders, weights, strict=True) if module in deltas(folder)]
        mine = [w for _, w in held]
        if per == "module":
            wanted[module] = torch.from_numpy(RULES[name]([deltas(f)[module].numpy() for f, _ in held], mine))
        else:
            wanted[module] = cut(RULES[name]([spread_out(f) for f in folders], weights))[module]
    close(deltas(pool / "out"), wanted)


def test_where_on_the_arc_goes_by_name_and_not_by_order(pool: Path) -> None:
    ok("merge", "one=0.9", "three=0.1", "-m", "slerp", "-o", "near-one")
    ok("merge", "three=0.1", "one=0.9", "-m", "slerp", "-o", "turned")
    ok("merge", "three=0.9", "one=0.1", "-m", "slerp", "-o", "near-three")
    files = [Path(folder, "adapter_model.safetensors").read_bytes() for folder in ("near-one", "turned", "near-three")]
    assert files[0] == files[1] != files[2]
    one, near, far = (spread_out(Path(folder)) for folder in ("one", "near-one", "near-three"))
    assert np.linalg.norm(near - one) < np.linalg.norm(far - one)


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["one", "two", "three", "-m", "slerp"], 5, "two adapters, not 3"),
        (["one", "two", "-m", "nuslerp", "--per", "adapter"], 2, "takes no --per"),
        (["one", "two", "-m", "slerp", "--angles", "row"], 2, "takes no --angles"),
        (["one", "three", "-m", "karcher", "--per", "layer"], 2, "module, adapter"),
    ],
)
def test_a_merge_that_cannot_be_is_refused(words: Sequence[str], code: int, told: str, pool: Path) -> None:
    assert told in refused(code, "merge", *words, "-o", "out")
    assert not Path("out").exists()
