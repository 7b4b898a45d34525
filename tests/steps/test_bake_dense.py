"""`lora bake` of what `lora merge --dense` wrote: the whole update, with nothing lost to a rank."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.adapters_on_disk import random_factors, write_adapter
from tests.cli import ok, refused
from tests.steps.test_bake import GPT2, LLAMA, adapter_of, configured, logits, weights
from tests.steps.test_merge import deltas
from tests.tiny_bases import saved, tiny_gpt2


def dense(tmp_path: Path, *options: str) -> Path:
    """Two adapters of the llama merged into `whole`."""
    one = adapter_of(tmp_path / "one")
    factors = random_factors(LLAMA, 3, seed=2)
    two = write_adapter(tmp_path / "two", factors, base="acme/base")
    ok("merge", str(one), str(two), "--dense", "-o", "whole", *options)
    return Path("whole")


def updates(folder: Path) -> dict[str, Tensor]:
    """What a dense result holds, by module."""
    file = load_file(folder / "delta.safetensors")
    return {name.removesuffix(".weight"): delta.double() for name, delta in file.items()}


def test_the_whole_update_of_ties_is_added(tmp_path: Path) -> None:
    base, whole = saved(tmp_path / "base"), dense(tmp_path, "-m", "ties")
    told = ok("bake", "whole", "--base", str(base), "-o", "out")
    assert "8 modules in 2 layers in fp32" in told.err
    before, after = weights(base), weights(Path("out"))
    for module, delta in updates(whole).items():
        name = f"{module}.weight"
        torch.testing.assert_close(after[name].double(), before.pop(name).double() + delta, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    record = json.loads(Path("out/run.json").read_text())
    merged = json.loads(Path("whole/run.json").read_text())["outputs"]["delta.safetensors"]
    assert merged in record["inputs"].values()
    assert "up to date" in ok("bake", "whole", "--base", str(base), "-o", "out").err


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_what_was_lost_is_what_baking_its_factors_loses(tmp_path: Path, dtype: str) -> None:
    base = saved(tmp_path / "base")
    dense(tmp_path, "-m", "linear")
    ok("merge", str(tmp_path / "one"), str(tmp_path / "two"), "-m", "linear", "--rank", "sum", "-o", "factors")
    found = []
    for name in ("whole", "factors"):
        ok("bake", name, "--base", str(base), "--dtype", dtype, "-o", f"of-{name}")
        found.append(json.loads(Path(f"of-{name}/run.json").read_text())["results"])
    assert found[0]["lost"] == pytest.approx(found[1]["lost"], rel=0.02)
    assert found[0]["norm"] == pytest.approx(found[1]["norm"], rel=1e-6)
    torch.testing.assert_close(logits(Path("of-whole")), logits(Path("of-factors")), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("named", [True, False], ids=["gpt2", "no model type"])
def test_conv1d_takes_it_the_other_way_round(tmp_path: Path, named: bool) -> None:
    base = tmp_path / "base"
    tiny_gpt2().save_pretrained(base)
    adapter = adapter_of(tmp_path / "adapter", GPT2, fan_in_fan_out=True)
    ok("merge", str(adapter), "-m", "linear", "--dense", "-o", "whole")
    if not named:
        configured(base, model_type=None)
    told = ok("bake", "whole", "--base", str(base), "-o", "out")
    assert "2 square weights read as (in, out)" in told.err
    before, after = weights(base), weights(Path("out"))
    for module, delta in deltas(adapter).items():
        name = f"{module}.weight"
        torch.testing.assert_close(after[name].double(), before[name].double() + delta.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("named", [True, False], ids=["gpt2", "no model type"])
def test_parents_that_differ_in_fan_in_fan_out_are_added_the_right_way_round(tmp_path: Path, named: bool) -> None:
    base = tmp_path / "base"
    tiny_gpt2().save_pretrained(base)
    if not named:
        configured(base, model_type=None)
    flags = {"false": False, "true": True}
    one, two = (
        write_adapter(tmp_path / name, random_factors(GPT2, 2, seed=int(flag)), base="acme/base", fan_in_fan_out=flag)
        for name, flag in flags.items()
    )
    ok("merge", str(one), str(two), "-m", "linear", "--weights", "sum", "--dense", "-o", "whole")
    ok("bake", "whole", "--base", str(base), "-o", "out")
    before, after, other = weights(base), weights(Path("out")), deltas(two)
    for module, delta in deltas(one).items():
        changed = (after[f"{module}.weight"] - before[f"{module}.weight"]).double().T
        torch.testing.assert_close(changed, delta + other[module], rtol=1e-4, atol=1e-4)


def _changed(folder: Path) -> None:
    file = folder / "delta.safetensors"
    save_file({name: 2 * delta for name, delta in load_file(file).items()}, file, metadata={"format": "pt"})


def _cut(folder: Path) -> None:
    file = folder / "delta.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def _without_record(folder: Path) -> None:
    (folder / "run.json").unlink()


def _foreign_record(folder: Path) -> None:
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "outputs": {}}))


def _other_base(folder: Path) -> None:
    record = json.loads((folder / "run.json").read_text())
    record["settings"]["base"] = "acme/other"
    (folder / "run.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (_changed, 5, "delta.safetensors changed since it was written"),
        (_cut, 5, "delta.safetensors changed since it was written"),
        (_without_record, 1, "whole/run.json"),
        (_foreign_record, 5, "its run.json is not that of a dense merge"),
        (_other_base, 5, "is for acme/other, not for"),
    ],
)
def test_a_result_that_is_not_what_was_written_is_refused(
    tmp_path: Path, change: Callable[[Path], None], code: int, words: str
) -> None:
    base = saved(tmp_path / "base")
    change(dense(tmp_path))
    told = refused(code, "bake", "whole", "--base", str(base), "-o", "out")
    assert words in told
    assert len(told.strip().splitlines()) <= 2
    assert not Path("out").exists()


def test_a_module_that_the_base_lacks_is_named(tmp_path: Path) -> None:
    dense(tmp_path)
    base = saved(tmp_path / "base", num_hidden_layers=1)
    told = refused(5, "bake", "whole", "--base", str(base), "-o", "out")
    assert "no module model.layers.1.mlp.down_proj; modules that match: 4 of 8" in told


def test_other_commands_say_where_a_dense_result_can_go(tmp_path: Path) -> None:
    dense(tmp_path)
    assert "a dense result: lora bake takes it" in refused(5, "merge", "whole", "-o", "out")
    shutil.rmtree("whole")
    assert "lora bake takes it" not in refused(3, "merge", "whole", "-o", "out")
