"""An adapter that lacks a module is under --missing zero what an adapter is whose update is zero there."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_cli.algebra.lowrank import LowRank
from lora_cli.merge_options import METHODS
from lora_cli.records import AdapterRef
from lora_cli.steps.merge.module import _key
from tests.adapters_on_disk import random_factors, write_adapter
from tests.merge_methods.test_merge_laws import MIXED, expected, same, taken
from tests.merge_methods.test_merge_laws import merged as run
from tests.steps.test_merge import close, deltas, merged, opened

ONE, OTHER = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"
SHAPES = {ONE: (24, 18), OTHER: (20, 18)}
# On A and B apart an A counts even beside a B of zeros; RegMean has no inputs of an absent adapter.
COUNTS_APART = {name for name in METHODS.methods if name.startswith("peft-")} | {"regmean"}


@pytest.mark.slow
@pytest.mark.parametrize("match", [False, True], ids=["as it comes", "norm-match"])
@pytest.mark.parametrize("name", sorted(METHODS.methods.keys() - COUNTS_APART))
def test_a_missing_module_merges_as_an_update_of_zero(name: str, match: bool, tmp_path: Path) -> None:
    pair = METHODS.get(name).name in ("slerp", "nuslerp")
    first = [write_adapter(tmp_path / str(i), random_factors(SHAPES, 3, seed=i)) for i in range(1 if pair else 2)]
    factors = random_factors(SHAPES, 3, seed=9)
    zero = write_adapter(tmp_path / "a/last", factors | {OTHER: (0 * factors[OTHER][0], factors[OTHER][1])})
    lacking = write_adapter(tmp_path / "b/last", {ONE: factors[ONE]})
    weights = [0.5, 0.25, 1.0][-len(first) - 1 :]
    options: dict[str, Any] = {"method": name, "norm_match": match}
    if METHODS.get(name).kind != "factors":
        options["energy"] = 1.0
    if name in ("core", "knots", "ctm", "pico"):
        # Bases of equal singular values would be left to rounding.
        options["knobs"] = {"inside": "linear"}
    merged(tmp_path / "zero", [*first, zero], weights, **options)
    merged(tmp_path / "absent", [*first, lacking], weights, **options)
    close({OTHER: deltas(tmp_path / "absent")[OTHER]}, {OTHER: deltas(tmp_path / "zero")[OTHER]}, 1e-5)


def test_sce_and_pico_count_adapters_that_lack_the_module() -> None:
    zero = LowRank(MIXED[3].B * 0, MIXED[3].A)
    given = replace(MIXED, items=(*MIXED.items[:3], zero))
    absent = replace(taken(MIXED, [0, 1, 2]), absent=(2.0,))
    for name in ("sce", "pico"):
        found = run(name, absent, [0.4, 1.0, 0.25])
        same(found, run(name, given, [0.4, 1.0, 0.25, 2.0]), 1e-9)
        same(found, expected(name, given, [0.4, 1.0, 0.25, 2.0]), 1e-9)


def test_adapters_of_one_repository_draw_numbers_of_their_own(tmp_path: Path) -> None:
    adapter = opened(write_adapter(tmp_path / "x", random_factors(SHAPES, 3, seed=1)))
    ref = AdapterRef(id="o/folds:fold0", commit="a" * 40, source="hub", repo="o/folds", subfolder="fold0")
    keys = set()
    for one in (ref, replace(ref, id="o/folds:fold1", subfolder="fold1"), replace(ref, commit="b" * 40)):
        keys |= {_key(replace(adapter, files=replace(adapter.files, ref=one)), module) for module in SHAPES}
    assert len(keys) == 6


def turned(update: LowRank, seed: int) -> LowRank:
    """The same update by other factors."""
    m = torch.randn(update.rank, update.rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    m += 3 * torch.eye(update.rank, dtype=torch.float64)
    return LowRank(update.B @ m, torch.linalg.solve(m, update.A))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("name", "knobs"), [("sce", {}), ("core", {"inside": "sce"}), ("sce", {"density": 0.1})], ids=str
)
def test_sce_does_not_choose_copies_entries_by_rounding(name: str, knobs: dict[str, Any], dtype: torch.dtype) -> None:
    items = [turned(MIXED[1], seed) for seed in range(4)]
    copies = replace(taken(MIXED, [1] * 4), items=tuple(u.to(dtype) for u in items), keys=(1, 2, 3, 4))
    wanted: Tensor = MIXED[1].dense()
    same(run(name, copies, [1.0] * 4, **knobs).double(), wanted, 1e-9 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("inside", ["linear", "tsv"])
@pytest.mark.parametrize("shared", ["A", "B"])
def test_ctm_has_room_for_all_directions_of_either_side(shared: str, inside: str) -> None:
    items = []
    for update in MIXED:
        b, a = (MIXED[1].B, update.A) if shared == "B" else (update.B, MIXED[1].A)
        rank = min(b.shape[1], a.shape[0])
        items.append(LowRank(b[:, :rank], a[:rank]))
    updates = replace(MIXED, items=tuple(items))
    within = run("ctm", updates, [1.0] * 4, inside=inside, compress_to=16)
    same(within, run(inside, updates, [1.0] * 4), 1e-8)
