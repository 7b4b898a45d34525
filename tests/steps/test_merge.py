"""`steps.merge` from folders to a folder: against dense arithmetic, PEFT and the safetensors library."""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_cli.catalogue.runs import recorded
from lora_cli.errors import OutputError, Refused, UsageError
from lora_cli.formats.reader import OpenAdapter, open_adapter
from lora_cli.formats.store import folder_ref, locate
from lora_cli.merge_options import MergeOptions
from lora_cli.records import Coefficients
from lora_cli.steps.merge.stream import MergePlan, MergeReport, merge, plan
from tests import dense_reference
from tests.adapters_on_disk import random_factors, write_adapter
from tests.paths import SHARED
from tests.readers import peft as deltas

WILD = SHARED / "wild" / "adapters"
needs_wild = pytest.mark.skipif(not WILD.is_dir(), reason="../shared/wild is not here")
SHAPES = {
    "model.layers.0.self_attn.q_proj": (48, 32),
    "model.layers.0.mlp.down_proj": (32, 80),
    "model.layers.1.self_attn.q_proj": (48, 32),
    "model.layers.10.self_attn.q_proj": (48, 32),
}
Q = {name: shape for name, shape in SHAPES.items() if "q_proj" in name}


def opened(folder: Path) -> OpenAdapter:
    files = locate(folder_ref(folder))
    assert files is not None
    return open_adapter(files)


def planned_merge(adapters: Sequence[OpenAdapter], weights: Sequence[float], **given: Any) -> MergePlan:
    """The plan of a linear merge, or of another method; `given` are options of the merge and arguments of `plan`."""
    options = {name: given.pop(name) for name in MergeOptions.__struct_fields__ if name in given}
    base = given.pop("base", "acme/tiny")
    return plan(adapters, weights, MergeOptions(**{"method": "linear", **options}), base=base, **given)


def merged(out: Path, folders: Sequence[Path], weights: Sequence[float], **options: Any) -> MergeReport:
    planned = planned_merge([opened(f) for f in folders], weights, **options)
    with recorded(out.parent / "runs.db", "merge", planned.settings, {}, out) as run:
        return merge(planned, out, run)


def close(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-5) -> None:
    """Equal to `tolerance` of the whole norm, modules that one side lacks counting as zero."""
    error = norm = 0.0
    for module in actual.keys() | expected.keys():
        have, want = actual.get(module), expected.get(module)
        error += float(((0 if have is None else have) - (0 if want is None else want)).square().sum())
        norm += float(want.square().sum()) if want is not None else 0.0
    assert error**0.5 <= tolerance * norm**0.5


@pytest.fixture
def pool(tmp_path: Path) -> list[Path]:
    """Three adapters of different ranks, scales and target modules."""
    plain = write_adapter(tmp_path / "plain", random_factors(SHAPES, 4, seed=1), lora_alpha=8)
    rslora = write_adapter(tmp_path / "rslora", random_factors(Q, 9, seed=2), lora_alpha=3, use_rslora=True)
    ranks = {module: 2 + i for i, module in enumerate(SHAPES)}
    pattern = write_adapter(
        tmp_path / "pattern",
        random_factors(SHAPES, ranks, seed=3),
        rank_pattern={module: r for module, r in ranks.items() if r != 2},
        alpha_pattern={"model.layers.1.self_attn.q_proj": 7},
        lora_alpha=5,
    )
    return [plain, rslora, pattern]


def reference(pool: Sequence[Path], weights: Sequence[float], method: str, **knobs: Any) -> dict[str, Tensor]:
    parents = [deltas(folder) for folder in pool]
    result = {}
    for module in SHAPES:
        present = [(p[module].numpy(), w) for p, w in zip(parents, weights, strict=True) if module in p]
        case = dense_reference.Case([(d, np.eye(d.shape[1])) for d, _ in present], [w for _, w in present])
        result[module] = torch.from_numpy(getattr(dense_reference, method)(case, **knobs))
    return result


@pytest.mark.parametrize("method", ["linear", "cat"])
def test_a_weighted_sum_of_mixed_adapters_is_exact(pool: list[Path], tmp_path: Path, method: str) -> None:
    weights = [0.5, -1.0, 2.0]
    report = merged(tmp_path / "out", pool, weights, method=method)
    close(deltas(tmp_path / "out"), reference(pool, weights, "linear"), 1e-6)
    assert report.energy == pytest.approx(1)
    assert len(report.modules) == len(SHAPES)


def test_ties_at_full_rank_equals_the_dense_reference(pool: list[Path], tmp_path: Path) -> None:
    weights = [1.0, 1.0, 0.5]
    merged(tmp_path / "out", pool, weights, method="ties", knobs={"density": 0.3}, energy=1.0)
    close(deltas(tmp_path / "out"), reference(pool, weights, "ties", density=0.3), 1e-5)


def test_the_reported_energy_is_what_a_lower_rank_keeps(pool: list[Path], tmp_path: Path) -> None:
    report = merged(tmp_path / "out", pool, [1.0, 1.0, 1.0], rank="3")
    want = reference(pool, [1.0, 1.0, 1.0], "linear")
    kept = sum(float(d.square().sum()) for d in deltas(tmp_path / "out").values())
    total = sum(float(d.square().sum()) for d in want.values())
    assert report.energy == pytest.approx(kept / total, rel=1e-5)
    best = sum(float(torch.linalg.svdvals(d)[:3].square().sum()) for d in want.values())
    assert kept == pytest.approx(best, rel=1e-5)
    assert report.ranks == (3, 3)


def test_one_adapter_with_weight_one_comes_back_to_the_bit(tmp_path: Path) -> None:
    parent = write_adapter(tmp_path / "parent", random_factors(SHAPES, 6, seed=4), lora_alpha=6)
    merged(tmp_path / "out", [parent], [1.0])
    old, new = (load_file(folder / "adapter_model.safetensors") for folder in (parent, tmp_path / "out"))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_missing_modules_count_as_zero_or_are_renormalised(pool: list[Path], tmp_path: Path) -> None:
    third = [1 / 3] * 3
    merged(tmp_path / "zero", pool, third)
    merged(tmp_path / "renorm", pool, third, missing="renorm")
    module = "model.layers.0.mlp.down_proj"  # the rslora adapter lacks it
    zero, renorm = deltas(tmp_path / "zero"), deltas(tmp_path / "renorm")
    close({module: renorm[module]}, {module: zero[module] * 1.5}, 1e-6)
    other = "model.layers.1.self_attn.q_proj"
    close({other: renorm[other]}, {other: zero[other]}, 1e-6)


def test_lambda_scales_the_result(pool: list[Path], tmp_path: Path) -> None:
    merged(tmp_path / "one", pool, [1.0] * 3)
    report = merged(tmp_path / "half", pool, [1.0] * 3, lambda_=0.5)
    close(deltas(tmp_path / "half"), {m: d / 2 for m, d in deltas(tmp_path / "one").items()}, 1e-6)
    norm = sum(float(d.square().sum()) for d in deltas(tmp_path / "half").values()) ** 0.5
    assert report.norm == pytest.approx(norm, rel=1e-5)


def test_coefficients_weigh_each_module_and_rank(pool: list[Path], tmp_path: Path) -> None:
    adapters = [opened(folder) for folder in pool[:2]]
    module = "model.layers.1.self_attn.q_proj"
    per_rank = tuple(float(i) for i in range(9))
    coefficients = Coefficients(
        adapters=tuple(a.ref.pinned for a in adapters),
        values={m: ((0.5,), per_rank if m == module else (2.0,)) for m in SHAPES},
        granularity="rank",
        activation="linear",
        task_sha256="0" * 64,
        base="acme/tiny",
    )
    merged(tmp_path / "out", pool[:2], [1.0, 1.0], coefficients=coefficients, rank="sum")
    first, second = (deltas(folder) for folder in pool[:2])
    want = {m: 0.5 * first[m] + 2.0 * second.get(m, torch.zeros(())) for m in SHAPES}
    tensors = load_file(pool[1] / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "AB")
    want[module] = 0.5 * first[module] + 3 / 9**0.5 * (b * torch.tensor(per_rank, dtype=torch.float64)) @ a
    close(deltas(tmp_path / "out"), want, 1e-6)


def test_equal_inputs_give_equal_bytes_in_any_order(pool: list[Path], tmp_path: Path) -> None:
    merged(tmp_path / "one", pool, [1.0, 2.0, 3.0], method="ties")
    merged(tmp_path / "two", pool[::-1], [3.0, 2.0, 1.0], method="ties")
    for file in ("adapter_model.safetensors", "adapter_config.json", "README.md", "run.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_the_card_and_the_record_name_every_parent(pool: list[Path], tmp_path: Path) -> None:
    merged(tmp_path / "out", pool, [1.0, 1.0, 1.0])
    card = (tmp_path / "out" / "README.md").read_text()
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    for folder in pool:
        ref = folder_ref(folder)
        assert ref.id in card
        assert ref.commit in card
        assert record["settings"]["weights"][ref.pinned] == 1.0
    assert str(tmp_path) not in card + json.dumps(record)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_result_is_rounded_once_at_the_end(pool: list[Path], tmp_path: Path, dtype: str) -> None:
    merged(tmp_path / "full", pool, [1.0] * 3)
    merged(tmp_path / "half", pool, [1.0] * 3, dtype=dtype)
    full, half = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("full", "half"))
    kind = torch.bfloat16 if dtype == "bf16" else torch.float16
    assert all(torch.equal(full[name].to(kind), half[name]) for name in full)


def test_overflow_in_half_precision_is_refused(tmp_path: Path) -> None:
    parent = write_adapter(tmp_path / "big", random_factors(Q, 2, seed=1), lora_alpha=1e7)
    with pytest.raises(Refused, match="overflow fp16"):
        merged(tmp_path / "out", [parent], [1.0], dtype="fp16")
    assert not (tmp_path / "out").exists()


def test_peft_loads_the_result_and_adds_the_same_update(pool: list[Path], tmp_path: Path) -> None:
    report = merged(tmp_path / "out", pool, [0.5, 1.0, -1.0], energy=0.9)
    low, high = report.ranks
    assert low < high  # so that rank_pattern is put to the test
    close(in_peft([tmp_path / "out"], [1.0]), deltas(tmp_path / "out"), 1e-6)


@pytest.mark.slow
@needs_wild
@pytest.mark.parametrize(
    "names",
    [
        ["justbautista__fine-tuning__emotion_lora_model", "justbautista__fine-tuning__keywords_lora_model",
         "justbautista__fine-tuning__therapist_lora_model"],
        ["0112LY__logo-gemma-lora__adapter", "ao-wei__gemma3-270m-svg-lora-partb__adapter",
         "fanyihan-max__WorkforLLM__adapter", "zouhe0__LLM-Homework__adapter"],
    ],
    ids=["justbautista", "gemma"],
)  # fmt: skip
def test_real_adapters_merge_as_in_pefts_cat(tmp_path: Path, names: list[str]) -> None:
    folders, weights = [WILD / name for name in names], [0.7, -0.4, 1.0, 0.25][: len(names)]
    expected = in_peft(folders, weights)
    for method in ("linear", "cat"):
        merged(tmp_path / method, folders, weights, method=method)
        close(deltas(tmp_path / method), expected, 1e-5)


def in_peft(
    folders: Sequence[Path], weights: Sequence[float], combination: str = "cat", **options: Any
) -> dict[str, Tensor]:
    """The update that PEFT's add_weighted_adapter makes of these folders on a bare base; of one, its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import LoraConfig, PeftModel

        shapes = {m: tuple(d.shape) for folder in folders for m, d in deltas(folder).items()}
        root = nn.Module()
        for module, (out, inn) in shapes.items():
            holder = root
            for part in module.split(".")[:-1]:
                if not hasattr(holder, part):
                    setattr(holder, part, nn.Module())
                holder = getattr(holder, part)
            setattr(holder, module.rpartition(".")[2], nn.Linear(inn, out, bias=False))
        model: Any = None
        for i, folder in enumerate(folders):
            config = LoraConfig.from_pretrained(str(folder))
            config.task_type = None  # a bare base has no generate()
            if model is None:
                model = PeftModel.from_pretrained(root, str(folder), adapter_name="a0", config=config)
            else:
                model.load_adapter(str(folder), adapter_name=f"a{i}", peft_config=config)
        name = "a0"
        if len(folders) > 1:
            names, name = [f"a{i}" for i in range(len(folders))], "merged"
            model.base_model.add_weighted_adapter(names, list(weights), name, combination, **options)
    layers = {module: model.base_model.model.get_submodule(module) for module in shapes}
    return {m: layer.get_delta_weight(name).detach().double() for m, layer in layers.items() if name in layer.lora_A}


def test_what_contradicts_itself_is_refused_by_name(pool: list[Path], tmp_path: Path) -> None:
    other = write_adapter(tmp_path / "other", random_factors({"model.layers.0.self_attn.q_proj": (40, 32)}, 2, seed=1))
    with pytest.raises(Refused, match=r"q_proj is (48|40)×32 in .*(plain|other) but (48|40)×32 in .*(plain|other)"):
        merged(tmp_path / "out", [pool[0], other], [1, 1])
    with pytest.raises(Refused, match="given twice"):
        merged(tmp_path / "out", [pool[0], pool[0]], [1, 1])
    with pytest.raises(UsageError, match="unknown merge method 'tise'") as caught:
        merged(tmp_path / "out", pool, [1, 1, 1], method="tise")
    assert caught.value.hint == "did you mean 'ties'?"
    for options, words in (
        ({"method": "ties", "knobs": {"density": 0.0}}, "density 0.0 is out of range: 0 < x <= 1"),
        ({"method": "linear", "knobs": {"density": 0.5}}, "takes no --density"),
        ({"method": "cat", "rank": "4"}, "--rank and --energy cannot be combined with --method cat"),
        ({"rank": "many"}, "--rank is a number"),
        ({"rank": "0"}, "--rank is a number"),
        ({"energy": 1.5}, "--energy lies in"),
    ):
        with pytest.raises(UsageError, match=words):
            merged(tmp_path / "out", pool, [1, 1, 1], **options)
    with pytest.raises(UsageError, match="finite"):
        merged(tmp_path / "out", pool, [1, float("nan"), 1])
    with pytest.raises(Refused, match="sum to zero"):
        merged(tmp_path / "out", pool, [1, -1, 0], missing="renorm")
    assert not (tmp_path / "out").exists()


def test_an_adapter_with_nan_or_without_effect_is_refused(pool: list[Path], tmp_path: Path) -> None:
    broken = random_factors(SHAPES, 2, seed=5)
    broken["model.layers.1.self_attn.q_proj"][0][3, 1] = float("nan")
    write_adapter(tmp_path / "nan", broken)
    with pytest.raises(Refused, match=r"nan: NaN or Inf in model\.layers\.1\.self_attn\.q_proj"):
        merged(tmp_path / "out", [pool[0], tmp_path / "nan"], [1, 1])
    silent = {m: (torch.zeros_like(b), a) for m, (b, a) in random_factors(SHAPES, 2, seed=6).items()}
    write_adapter(tmp_path / "silent", silent)
    with pytest.raises(Refused, match="silent: no effect"):
        merged(tmp_path / "out", [pool[0], tmp_path / "silent"], [1, 1])
    assert [p.name for p in tmp_path.iterdir() if "out" in p.name] == []


def test_an_output_that_exists_stays(pool: list[Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        merged(tmp_path / "out", pool, [1, 1, 1])
    assert (tmp_path / "out" / "precious.txt").read_text() == "mine"
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="link"):
        merged(tmp_path / "link", pool, [1, 1, 1])
