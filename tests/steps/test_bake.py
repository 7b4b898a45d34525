"""`lora bake`: the update in the base's weights, against dense arithmetic, PEFT and transformers; what is refused."""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lora_cli.algebra.lowrank import LowRank
from lora_cli.hub.client import Hub
from lora_cli.models.download import download_base
from lora_cli.models.ref import pin
from lora_cli.steps.bake import bake as baking
from lora_cli.steps.bake.bake import add
from lora_cli.steps.bake.plan import weights_of
from tests.adapters_on_disk import random_factors, write_adapter
from tests.cli import ok, refused
from tests.fake_hub import FakeHub
from tests.paths import ROOT
from tests.steps.test_merge import deltas
from tests.tiny_bases import STORIES, needs_stories, saved, tiny_gpt2, tiny_llama

LLAMA = {
    f"model.layers.{layer}.{module}": shape
    for layer in (0, 1)
    for module, shape in {
        "self_attn.q_proj": (32, 32),
        "self_attn.k_proj": (16, 32),
        "mlp.up_proj": (48, 32),
        "mlp.down_proj": (32, 48),
    }.items()
}
GPT2 = {
    f"transformer.h.{layer}.{module}": shape
    for layer in (0, 1)
    for module, shape in {"attn.c_attn": (96, 32), "attn.c_proj": (32, 32), "mlp.c_fc": (128, 32)}.items()
}


def adapter_of(folder: Path, shapes: dict[str, tuple[int, int]] = LLAMA, *, size: float = 1.0, **config: Any) -> Path:
    factors = {module: (size * b, a) for module, (b, a) in random_factors(shapes, 4, seed=1).items()}
    return write_adapter(folder, factors, base="acme/base", lora_alpha=8, **config)


def rewritten(base: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """The same base with other tensors."""
    file = base / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return base


def configured(base: Path, **values: Any) -> Path:
    """The same base with other keys in its configuration; None removes one."""
    config = {**json.loads((base / "config.json").read_text()), **values}
    (base / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return base


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def logits(folder: Path, adapter: Path | None = None, *, merged: bool = False) -> Tensor:
    """What transformers makes of a model's folder, with an adapter applied or merged by PEFT."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model: Any = AutoModelForCausalLM.from_pretrained(folder)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, str(adapter)).eval()
            model = model.merge_and_unload() if merged else model
        result: Tensor = model(torch.arange(3, 40)[None]).logits
        return result


def bake(adapter: Path, base: Path, out: str = "out", *options: str) -> dict[str, Any]:
    """Bake by the command line; the record."""
    told = ok("bake", str(adapter), "--base", str(base), "-o", out, "--json", *options)
    document: dict[str, Any] = json.loads(told.out)
    assert document["schema"] == "lora.bake/1"
    return document


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return saved(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return adapter_of(tmp_path / "adapter")


@pytest.mark.parametrize("dtype", ["auto", "bf16", "fp16"])
def test_every_weight_is_the_rounded_sum_and_the_loss_is_what_dense_arithmetic_finds(
    base: Path, tmp_path: Path, dtype: str
) -> None:
    adapter = adapter_of(tmp_path / "small", size=2e-3)
    results = bake(adapter, base, "out", "--dtype", dtype)["results"]
    before, after, moves = weights(base), weights(Path("out")), deltas(adapter)
    stored = {"auto": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert after.keys() == before.keys()
    errors = norms = same = entries = 0.0
    by_module = {row["module"]: row for row in results["modules"]}
    assert [*by_module] == sorted(LLAMA)
    for name, weight in before.items():
        delta = moves.get(name.removesuffix(".weight"))
        assert after[name].dtype == stored
        if delta is None:
            assert torch.equal(after[name], weight.to(stored))
            continue
        exact = weight.double() + delta
        # One rounding of a sum in fp32: half a unit in the last place of what is stored, and a little of fp32.
        torch.testing.assert_close(after[name].double(), exact, rtol=0.51 * torch.finfo(stored).eps, atol=1e-6)
        error, norm = (after[name].double() - exact).norm(), delta.norm()
        row = by_module[name.removesuffix(".weight")]
        assert row["lost"] == pytest.approx(float(error / norm), rel=1e-3 if stored != torch.float32 else 0.05)
        assert row["norm"] == pytest.approx(float(norm), rel=1e-5)
        unchanged = int((after[name] == weight.to(stored)).sum())
        assert row["unchanged"] == unchanged / weight.numel()
        errors, norms = errors + float(error) ** 2, norms + float(norm) ** 2
        same, entries = same + unchanged, entries + weight.numel()
    assert results["lost"] == pytest.approx((errors / norms) ** 0.5, rel=1e-3 if stored != torch.float32 else 0.05)
    assert results["unchanged"] == same / entries
    layers = {row["layer"]: row for row in results["layers"]}
    assert [*layers] == ["model.layers.0", "model.layers.1"]
    assert all(row["modules"] == 4 for row in layers.values())


def test_a_base_in_fp64_is_added_to_in_fp64() -> None:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(70, 30, generator=g, dtype=torch.float64)
    update = LowRank(*(torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((70, 3), (3, 30))))
    baked, survival = add(weight, update, torch.float64)
    assert torch.equal(baked, weight + update.dense())
    assert 0 < survival.lost < 1e-15


def test_an_update_that_vanishes_is_lost_whole_and_not_more() -> None:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 64, generator=g).bfloat16()
    update = LowRank(1e-8 * torch.randn(64, 2, generator=g), torch.randn(2, 64, generator=g))
    baked, survival = add(weight, update, torch.bfloat16)
    assert torch.equal(baked, weight)
    assert survival.lost == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}], ids=["one file", "parts"])
def test_peft_and_transformers_agree_on_a_llama(tmp_path: Path, adapter: Path, options: dict[str, str]) -> None:
    base = saved(tmp_path / "base")
    if options:
        (base / "model.safetensors").unlink()
        tiny_llama().save_pretrained(base, **options)
        assert len([*base.glob("*.safetensors")]) > 2
    bake(adapter, base)
    torch.testing.assert_close(logits(Path("out")), logits(base, adapter), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(logits(Path("out")), logits(base, adapter, merged=True), rtol=1e-6, atol=1e-5)
    assert (logits(Path("out")) - logits(base)).abs().max() > 0.1


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("prefixed", [True, False])
def test_conv1d_is_stored_the_other_way_round_whatever_the_adapter_says(
    tmp_path: Path, flag: bool, prefixed: bool
) -> None:
    base = tmp_path / "base"
    tiny_gpt2().save_pretrained(base)
    if not prefixed:
        rewritten(base, lambda tensors: {name.removeprefix("transformer."): t for name, t in tensors.items()})
    adapter = adapter_of(tmp_path / "adapter", GPT2, fan_in_fan_out=flag)
    told = ok("bake", str(adapter), "--base", str(base), "-o", "out")
    assert ("although the adapter sets" in told.err) == (not flag)
    assert "2 square weights read as (in, out): the base is a gpt2" in told.err
    torch.testing.assert_close(logits(Path("out")), logits(base, adapter), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(logits(Path("out")), logits(base, adapter, merged=True), rtol=1e-6, atol=1e-5)
    assert (logits(Path("out")) - logits(base)).abs().max() > 0.1
    names = {row["tensor"] for row in json.loads(Path("out/run.json").read_text())["results"]["modules"]}
    assert ("transformer.h.0.attn.c_attn.weight" in names) == prefixed


def test_without_a_model_type_the_adapters_flag_decides_square_weights(base: Path, tmp_path: Path) -> None:
    shapes = {module: shape for module, shape in LLAMA.items() if "q_proj" in module}
    adapter = adapter_of(tmp_path / "adapter", shapes, fan_in_fan_out=True)
    told = ok("bake", str(adapter), "--base", str(base), "-o", "llama")
    assert "read as (out, in): the base is a llama, although the adapter sets fan_in_fan_out true" in told.err
    told = ok("bake", str(adapter), "--base", str(configured(base, model_type=None)), "-o", "unknown")
    assert "read as (in, out): the adapter sets fan_in_fan_out" in told.err
    for name, delta in deltas(adapter).items():
        plain = weights(base)[f"{name}.weight"]
        torch.testing.assert_close(weights(Path("llama"))[f"{name}.weight"], (plain + delta).float())
        torch.testing.assert_close(weights(Path("unknown"))[f"{name}.weight"], (plain + delta.T).float())


@needs_stories
def test_a_baked_real_model_gives_the_logits_of_base_and_adapter(tmp_path: Path) -> None:
    shapes = {f"model.layers.{i}.self_attn.{m}": s for i in range(5) for m, s in (("q_proj", (64, 64)),)}
    shapes |= {f"model.layers.{i}.mlp.down_proj": (64, 172) for i in range(5)}
    adapter = adapter_of(tmp_path / "adapter", shapes, size=0.02)
    base = Path(shutil.copytree(STORIES, tmp_path / "base"))
    assert bake(adapter, base)["results"]["lost"] < 1e-4
    torch.testing.assert_close(logits(Path("out")), logits(base, adapter), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("module", "tensors", "found"),
    [
        ("model.layers.0.q", ["model.layers.0.q.weight", "layers.0.q.weight"], "model.layers.0.q.weight"),
        ("transformer.h.0.c", ["h.0.c.weight", "h.1.c.weight"], "h.0.c.weight"),
        ("layers.0.q", ["model.layers.0.q.weight", "model.layers.10.q.weight"], "model.layers.0.q.weight"),
        ("layers.0.q", ["encoder.layers.0.q.weight", "decoder.layers.0.q.weight"], None),
        ("a.b.layers.0.q", ["b.layers.0.q.weight", "layers.0.q.weight"], None),
        ("model.layers.0.q", ["0.q.weight", "q.weight"], None),
        ("model.layers.0.q", ["model.layers.0.q.bias"], None),
    ],
)
def test_a_module_is_found_under_its_name_with_or_without_the_prefix(
    module: str, tensors: list[str], found: str | None
) -> None:
    assert weights_of([module], tensors) == {module: found}


def test_what_comes_out_is_the_base_with_other_weights(base: Path, adapter: Path) -> None:
    for name in ("LICENSE", "README.md", "modeling_x.py", "run.json", "adapter_config.json", "notes.bin"):
        (base / name).write_text("{}")
    (adapter / "tokenizer.json").write_text("not the base's")
    told = ok("bake", str(adapter), "--base", str(base), "-o", "out")
    assert told.out == "out\n"
    [_, licences] = told.err.splitlines()
    assert licences.endswith("/adapter (not stated)")
    assert "8 modules in 2 layers in fp32 · under 0.01 % of the update lost" in told.err
    files = {file.name: file.read_bytes() for file in Path("out").iterdir()}
    kept = {"chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert files.keys() == {*kept, "LICENSE", "model.safetensors", "run.json"}
    assert all(files[name] == (base / name).read_bytes() for name in (*kept, "LICENSE"))
    with safe_open(Path("out/model.safetensors"), "pt") as ours, safe_open(base / "model.safetensors", "pt") as theirs:
        assert ours.metadata() == theirs.metadata()
        assert ours.keys() == theirs.keys()
    assert (Path("out/model.safetensors")).stat().st_size == (base / "model.safetensors").stat().st_size
    record = json.loads(files["run.json"])
    version = pin(str(base)).version
    assert record["inputs"][f"base:acme/base@{version}"] == version
    assert len(record["inputs"]) == 2
    assert record["outputs"].keys() == {"model.safetensors"}


def test_parts_keep_their_names_and_the_index_says_the_new_size(tmp_path: Path, adapter: Path) -> None:
    base = tmp_path / "base"
    tiny_llama().save_pretrained(base, max_shard_size="20KB")
    bake(adapter, base, "out", "--dtype", "bf16")
    old, new = (json.loads((f / "model.safetensors.index.json").read_text()) for f in (base, Path("out")))
    assert new["weight_map"] == old["weight_map"]
    assert new["metadata"]["total_size"] == old["metadata"]["total_size"] // 2
    assert {f.name for f in Path("out").glob("*.safetensors")} == {f.name for f in base.glob("*.safetensors")}
    config = json.loads(Path("out/config.json").read_text())
    assert config == {**json.loads((base / "config.json").read_text()), "dtype": "bfloat16"}
    assert logits(Path("out")).dtype == torch.bfloat16


@pytest.mark.parametrize("metadata", [5, [], None, "x"])
def test_an_index_whose_metadata_is_none(metadata: object, tmp_path: Path, adapter: Path) -> None:
    base = tmp_path / "base"
    tiny_llama().save_pretrained(base, max_shard_size="20KB")
    index = base / "model.safetensors.index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "metadata": metadata}))
    bake(adapter, base, "out")
    assert json.loads(Path("out/model.safetensors.index.json").read_text())["metadata"].keys() == {"total_size"}


def test_both_names_of_the_precision_are_changed_in_every_part_of_a_configuration(base: Path, adapter: Path) -> None:
    configured(base, dtype=None, torch_dtype="float32", text_config={"torch_dtype": "float32", "layers": 2})
    bake(adapter, base, "out", "--dtype", "fp16")
    config = json.loads(Path("out/config.json").read_text())
    assert config["torch_dtype"] == "float16"
    assert config["text_config"] == {"torch_dtype": "float16", "layers": 2}
    assert "dtype" not in config


def test_integers_and_other_tensors_go_through_a_cast_as_they_are(base: Path, adapter: Path) -> None:
    counter, mask = torch.arange(7), torch.tensor([0.0, float("-inf")])
    fours = torch.arange(3 << 19, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)  # three blocks of entries
    more = {"counter": counter, "mask": mask, "empty": torch.zeros(0, 3), "fours": fours}
    rewritten(base, lambda tensors: tensors | more)
    bake(adapter, base, "out", "--dtype", "bf16")
    after = weights(Path("out"))
    assert torch.equal(after["counter"], counter)
    assert torch.equal(after["mask"], mask.bfloat16())
    assert after["empty"].shape == (0, 3)
    assert torch.equal(after["fours"].view(torch.uint8), fours.view(torch.uint8))


def test_the_same_bake_is_up_to_date_and_equal_bytes_come_out_of_force(base: Path, adapter: Path) -> None:
    words = ("bake", str(adapter), "--base", str(base), "-o", "out")
    ok(*words)
    first = {file.name: file.read_bytes() for file in Path("out").iterdir()}
    again = ok(*words)
    assert (again.out, "up to date" in again.err) == ("out\n", True)
    ok(*words, "--force")
    assert {file.name: file.read_bytes() for file in Path("out").iterdir()} == first
    assert "exists" in refused(1, *words, "--dtype", "bf16")
    ok(*words, "--dtype", "bf16", "--force")
    assert weights(Path("out"))["model.norm.weight"].dtype == torch.bfloat16
    configured(base, rope_theta=1.0)
    assert "exists" in refused(1, *words, "--dtype", "bf16")


def test_a_result_that_was_damaged_is_not_up_to_date(base: Path, adapter: Path) -> None:
    words = ("bake", str(adapter), "--base", str(base), "-o", "out")
    ok(*words)
    file = Path("out/model.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    assert "out/model.safetensors has changed since it was written" in refused(1, *words)
    file.unlink()
    assert "replace the folder with --force" in refused(1, *words)
    ok(*words, "--force")
    assert file.read_bytes() == whole


def test_code_and_a_tokenizer_that_do_not_come_along_are_named(base: Path, adapter: Path) -> None:
    told = ok("bake", str(adapter), "--base", str(base), "-o", "plain").err
    assert "not copied" not in told
    assert "no tokenizer" not in told
    for file in base.glob("tokenizer*"):
        file.unlink()
    configured(base, auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    told = ok("bake", str(adapter), "--base", str(base), "-o", "out").err
    assert "comes with code (auto_map), which is not copied" in told
    assert "no tokenizer beside its weights" in told


def test_a_plan_changes_nothing(base: Path, adapter: Path) -> None:
    told = ok("bake", str(adapter), "--base", str(base), "--dtype", "bf16", "--dry-run", "--json")
    plan = json.loads(told.out)
    assert (plan["schema"], plan["modules"], plan["dtype"]) == ("lora.bake.plan/1", 8, "bf16")
    assert plan["bytes"] == sum(2 * tensor.numel() for tensor in weights(base).values())
    assert [*Path().iterdir()] == []
    plan = json.loads(ok("bake", str(adapter), "--base", "acme/base", "--dry-run", "--json").out)
    assert (plan["out"], plan["fetch_base"]) == (None, "acme/base")


def test_a_loss_is_warned_of_and_shown_by_layer(base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(tmp_path / "faint", size=5e-4)
    words = ("bake", str(adapter), "--base", str(base), "-o", "out", "--dtype", "bf16")
    for told in (ok(*words), ok(*words)):
        [warning] = [line for line in told.err.splitlines() if line.startswith("warning")]
        assert "rounding to bf16 lost" in warning
        assert "(worst layer " in warning
        assert "use --dtype fp32, or serve the adapter unbaked" in warning
        assert told.out == "out\n"
    shown = ok(*words, "--layers")
    assert "  out" in shown.err.splitlines()
    table = [line.split("\t") for line in shown.out.splitlines()]
    assert [row[:2] for row in table] == [["model.layers.0", "4"], ["model.layers.1", "4"]]
    assert all(0.1 < float(row[3]) < 2 and 0.1 < float(row[4]) < 1 for row in table)
    assert "warning" not in ok(*words[:-1], "fp32", "--force").err


def test_an_update_that_no_weight_feels_is_refused(base: Path, tmp_path: Path) -> None:
    faint, none = adapter_of(tmp_path / "faint", size=1e-9), adapter_of(tmp_path / "none", size=0.0)
    told = refused(5, "bake", str(faint), "--base", str(base), "--dtype", "bf16", "-o", "out")
    assert "too small for bf16: none of 9,216 weights would change" in told
    assert "changes nothing" in refused(5, "bake", str(none), "--base", str(base), "-o", "out")
    assert [*Path().iterdir()] == []


def _quantised(base: Path) -> Path:
    return configured(base, quantization_config={"quant_method": "bitsandbytes"})


def _pickled(base: Path) -> Path:
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    return base


def _emptied(base: Path) -> Path:
    (base / "model.safetensors").unlink()
    return base


def _one_layer(base: Path) -> Path:
    return rewritten(base, lambda tensors: {name: t for name, t in tensors.items() if "layers.1.mlp" not in name})


def _wider(base: Path) -> Path:
    name = "model.layers.0.mlp.up_proj.weight"
    return rewritten(base, lambda tensors: {**tensors, name: torch.zeros(50, 32)})


def _integers(base: Path) -> Path:
    name = "model.layers.0.mlp.up_proj.weight"
    return rewritten(base, lambda tensors: {**tensors, name: torch.zeros(48, 32, dtype=torch.int8)})


def _broken(base: Path) -> Path:
    name = "model.layers.0.mlp.up_proj.weight"
    return rewritten(base, lambda tensors: {**tensors, name: tensors[name] * float("nan")})


def _huge(base: Path) -> Path:
    name = "model.layers.0.mlp.up_proj.weight"
    return rewritten(base, lambda tensors: {**tensors, name: tensors[name] * 1e7})


def _huge_elsewhere(base: Path) -> Path:
    name = "model.embed_tokens.weight"
    return rewritten(base, lambda tensors: {**tensors, name: tensors[name] * 1e7})


def _outside(base: Path) -> Path:
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    return _emptied(base)


def _linked_out(base: Path) -> Path:
    (base.parent / "secret").write_text("{}")
    (base / "tokenizer.json").unlink()
    (base / "tokenizer.json").symlink_to(base.parent / "secret")
    return base


def _listed_type(base: Path) -> Path:
    configured(base, model_type=["llama"])
    return _one_layer(base)


def _cut(base: Path) -> Path:
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return base


def _part_missing(base: Path) -> Path:
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    return _emptied(base)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_quantised, "is quantised"),
        (_pickled, "pytorch_model.bin only, a pickle"),
        (_emptied, "has no model.safetensors"),
        (_one_layer, "no module model.layers.1.mlp.down_proj; modules that match: 6 of 8"),
        (_wider, "model.layers.0.mlp.up_proj is 50×32 in acme/base and 48×32 in"),
        (_integers, "model.layers.0.mlp.up_proj is I8 in acme/base"),
        (_broken, "model.layers.0.mlp.up_proj: NaN or Inf in the base's own weight"),
        (_huge, "model.layers.0.mlp.up_proj: values overflow fp16"),
        (_huge_elsewhere, "model.embed_tokens.weight: values overflow fp16"),
        (_outside, "names ../model.safetensors, which is no file beside it"),
        (_linked_out, "acme/base: tokenizer.json is a link to outside its folder"),
        (_listed_type, "modules that match: 6 of 8"),
        (_cut, "acme/base: model.safetensors: truncated"),
        (_part_missing, "model-00001-of-00002.safetensors is missing"),
    ],
)
def test_a_base_that_cannot_take_the_update_is_refused(
    base: Path, adapter: Path, change: Callable[[Path], Path], words: str
) -> None:
    told = refused(5, "bake", str(adapter), "--base", str(change(base)), "--dtype", "fp16", "-o", "out")
    assert words in told
    said = [line for line in told.splitlines() if not line.startswith("module names are not checked")]
    assert len(said) <= 2
    assert [*Path().iterdir()] == []


def test_a_tied_head_is_refused_by_name(tmp_path: Path) -> None:
    adapter = adapter_of(tmp_path / "adapter", {"lm_head": (104, 32), **LLAMA})
    tied = saved(tmp_path / "tied/base", tie_word_embeddings=True)
    assert "lm_head.weight" not in weights(tied)
    told = refused(5, "bake", str(adapter), "--base", str(tied), "-o", "out")
    assert "adapts lm_head, whose weight in acme/base is tied to model.embed_tokens" in told
    free = saved(tmp_path / "free/base", tie_word_embeddings=False)
    bake(adapter, free)
    torch.testing.assert_close(logits(Path("out")), logits(free, adapter), rtol=1e-5, atol=1e-4)


def test_what_has_no_place_or_no_sense_is_refused(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("bake", str(adapter), "--base", str(base))
    assert "where the base is" in refused(1, *words, "-o", str(base))
    assert "where the base is" in refused(1, *words, "-o", str(base / "deeper"))
    assert "where the base is" in refused(1, *words, "-o", str(tmp_path), "--force")
    assert "where the adapter is" in refused(1, *words, "-o", str(adapter), "--force")
    assert "'int4' is not one of 'auto'" in refused(2, *words, "--dtype", "int4")
    assert "bake takes one adapter" in refused(2, "bake", "-", "--base", str(base), stdin="a\nb\n")
    assert "is for acme/base: give --base" in refused(2, "bake", str(adapter))
    assert "no base model at" in refused(3, "bake", str(adapter), "--base", "./none/base")
    monkeypatch.setattr(baking.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    assert "kB to write, 1 B free at" in refused(1, *words, "-o", "out")
    assert [*Path().iterdir()] == []


def test_a_base_of_the_hub_is_brought_into_its_cache_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    files = {file.name: file.read_bytes() for file in saved(tmp_path / "base").iterdir()}
    said: list[str] = []
    with FakeHub() as hub:
        repo = hub.add("acme/base", {**files, "pytorch_model.bin": b"pickle", "modeling.py": b"code"})
        folder = download_base(Hub(hub.endpoint), "acme/base", announce=said.append)
    assert folder.name == repo.sha
    assert {file.name for file in folder.iterdir()} == files.keys()
    [line] = said
    assert line.startswith("fetching the base acme/base, 5 files")
    adapter = adapter_of(tmp_path / "adapter")
    told = ok("bake", str(adapter), "--base", "acme/base", "-o", "out")
    assert "fetching" not in told.err
    record = json.loads(Path("out/run.json").read_text())
    assert record["inputs"][f"base:acme/base@{repo.sha}"] == repo.sha
    torch.testing.assert_close(logits(Path("out")), logits(tmp_path / "base", adapter), rtol=1e-5, atol=1e-4)


def test_further_chat_templates_go_along(tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    ok("bake", str(adapter_of(tmp_path / "adapter")), "--base", str(base), "-o", "out")
    assert Path("out", "additional_chat_templates", "tools.jinja").read_text() == "{{ messages }}"


def test_parts_of_a_base_of_the_hub_are_those_that_its_index_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    tiny_llama().save_pretrained(tmp_path / "base", max_shard_size="20KB")
    renamed = {}
    for file in sorted((tmp_path / "base").iterdir()):
        text = file.read_bytes()
        if file.name.endswith(".index.json"):
            text = text.replace(b'"model-0', b'"model.safetensors-0')
        renamed[file.name.replace("model-0", "model.safetensors-0")] = text
    adapter = adapter_of(tmp_path / "adapter")
    with FakeHub() as hub:
        hub.add("acme/base", renamed)
        folder = download_base(Hub(hub.endpoint), "acme/base", announce=print)
    assert {file.name for file in folder.iterdir()} == renamed.keys()
    # It has no tokenizer, and is here all the same once its weights are.
    told = ok("bake", str(adapter), "--base", "acme/base", "-o", "out")
    assert "no tokenizer beside its weights" in told.err
    torch.testing.assert_close(logits(Path("out")), logits(tmp_path / "base", adapter), rtol=1e-5, atol=1e-4)


_LARGE = 64 << 20  # bytes of the one tensor, of zeros, which take no room on the disk


def base_of_zeros(folder: Path, size: int) -> Path:
    """A base of one fp32 tensor of 1,024 columns, which has so many bytes."""
    folder.mkdir(parents=True)
    entry = {"dtype": "F32", "shape": [size // 4096, 1024], "data_offsets": [0, size]}
    header = json.dumps({"model.layers.0.q.weight": entry}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.slow
def test_memory_is_bounded_by_blocks_and_a_killed_bake_is_whole_or_absent(tmp_path: Path) -> None:
    base = base_of_zeros(tmp_path / "base", _LARGE)
    adapter = adapter_of(tmp_path / "adapter", {"model.layers.0.q": (_LARGE // 4096, 1024)})
    small = tmp_path / "small"
    base_of_zeros(small / "base", 4096)
    adapter_of(small / "adapter", {"model.layers.0.q": (1, 1024)})
    killed = (
        "import os, pathlib, signal, sys\nfrom lora_cli.app import app\nfrom lora_cli.steps.bake import bake\n"
        "inner, here = bake.add, pathlib.Path()\n"
        "def add(*given):\n"
        f"    if any(f.stat().st_size > {_LARGE // 8} for f in here.glob('.out.*/*.safet*')):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return inner(*given)\n"
        "bake.add = add\n"
        "app(sys.argv[1:], prog_name='lora')"
    )
    code = (
        "import sys\nfrom lora_cli.formats.run_record import peak_bytes\n"
        "from lora_cli.app import app\n"
        "def run(words):\n    try:\n        app(words, prog_name='lora')\n    except SystemExit as end:\n"
        "        assert not end.code\n"
        # What a process needs for its first bake, whatever its size, is no part of the rise.
        f"run(['bake', {str(small / 'adapter')!r}, '--base', {str(small / 'base')!r}, '-o', '../warm'])\n"
        "before = peak_bytes()\nrun(sys.argv[1:])\n"
        "print(peak_bytes() - before, sorted({'transformers', 'peft'} & set(sys.modules)))"
    )
    words = ["bake", str(adapter), "--base", str(base), "--dtype", "bf16", "-o", "out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def run(code: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True)

    assert run(killed).returncode == -signal.SIGKILL
    assert not Path("out").exists()
    assert [*Path().glob(".out.*/*.safet*")]
    done = run(code)
    assert done.returncode == 0, done.stderr
    _, path, told = done.stdout.splitlines()
    assert path == "out"
    assert [entry.name for entry in Path().iterdir()] == ["out"]
    rise, _, loaded = told.partition(" ")
    assert loaded == "[]"
    # The tensor has 64 MB, and adding whole tensors would take several times that.
    assert int(rise) < 48e6
    want = deltas(adapter)["model.layers.0.q"].bfloat16()
    torch.testing.assert_close(weights(Path("out"))["model.layers.0.q.weight"], want)
