"""What parents may differ in, and what the result makes of that: task, base, orientation, copies."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.adapters_on_disk import random_factors, write_adapter
from tests.cli import ok, refused
from tests.paths import SHARED
from tests.steps.test_merge import close, deltas, in_peft, needs_wild
from tests.tiny_bases import tiny_gpt2, tiny_llama

MORE = SHARED / "wild" / "more"
SHAPES = {
    f"model.layers.{n}.self_attn.{name}": (out, 32) for n in range(2) for name, out in (("q_proj", 32), ("v_proj", 16))
}
GPT2 = {
    f"transformer.h.{n}.{name}": shape
    for n in range(2)
    for name, shape in {"attn.c_attn": (96, 32), "attn.c_proj": (32, 32), "mlp.c_proj": (32, 128)}.items()
}


def adapter(name: str, seed: int = 1, **config: Any) -> str:
    """An adapter of the tiny Llama in the working folder."""
    return str(write_adapter(Path(name), random_factors(SHAPES, 2, seed=seed), **config))


def conv1d_parents() -> list[Path]:
    """Two adapters of the tiny GPT-2 that disagree about `fan_in_fan_out`, with square modules among theirs."""
    return [
        write_adapter(Path(name), random_factors(GPT2, 3, seed=seed), fan_in_fan_out=flag, base="acme/gpt2")
        for seed, (name, flag) in enumerate({"true": True, "false": False}.items())
    ]


def config_of(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(folder, "adapter_config.json").read_text())
    return found


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("declared", [None, "", "CAUSAL_LM"])
def test_a_task_type_is_that_of_the_parents_or_null_and_peft_loads_it(declared: str | None) -> None:
    from peft import PeftModel

    adapter("one", task_type=declared)
    adapter("two", seed=2, task_type=declared)
    adapter("sequence", seed=3, task_type="SEQ_CLS")
    ok("merge", "one", "two", "-o", "out")
    assert config_of("out")["task_type"] == (declared or None)
    model: Any = PeftModel.from_pretrained(tiny_llama(), "out")
    layers = {module: model.base_model.model.get_submodule(module) for module in SHAPES}
    close({m: layer.get_delta_weight("default").detach().double() for m, layer in layers.items()}, deltas(Path("out")))
    ok("merge", "one", "sequence", "-o", "mixed")
    assert config_of("mixed")["task_type"] is None


@pytest.mark.parametrize("declared", [None, ""])
def test_a_result_without_a_base_is_refused(declared: str | None) -> None:
    adapter("lost", base_model_name_or_path=declared)
    for plan in ([], ["--dry-run"]):
        told = refused(5, "merge", "lost", *plan)
        assert "lost declares no base model" in told
        assert "name its base model: --base NAME" in told


@pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning", "ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("flag", [True, False, None], ids=["true", "false", "as written"])
def test_peft_applies_a_result_to_conv1d_whatever_its_flag_says(flag: bool | None) -> None:
    from peft import PeftModel

    one, two = map(deltas, conv1d_parents())
    ok("merge", "true", "false", "-m", "linear", "--weights", "sum", "-o", "out")
    config = config_of("out")
    assert config["fan_in_fan_out"] is True
    Path("out/adapter_config.json").write_text(json.dumps(config | ({} if flag is None else {"fan_in_fan_out": flag})))
    before: Any = tiny_gpt2()
    after: Any = PeftModel.from_pretrained(tiny_gpt2(), "out")
    after = after.merge_and_unload()
    changed = {m: after.get_submodule(m).weight - before.get_submodule(m).weight for m in one}
    close({m: change.T.detach().double() for m, change in changed.items()}, {m: one[m] + two[m] for m in one})


@pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning", "ignore:.is_gradient_checkpointing:FutureWarning")
def test_peft_applies_a_result_to_linear_layers_whatever_its_flag_says() -> None:
    from peft import PeftModel

    adapter("true", fan_in_fan_out=True)
    adapter("false", seed=2, fan_in_fan_out=False)
    ok("merge", "true", "false", "-o", "out")
    model: Any = PeftModel.from_pretrained(tiny_llama(), "out")
    layers = {module: model.base_model.model.get_submodule(module) for module in SHAPES}
    close({m: layer.get_delta_weight("default").detach().double() for m, layer in layers.items()}, deltas(Path("out")))


def test_adapters_that_differ_in_fan_in_fan_out_can_be_compared() -> None:
    conv1d_parents()
    ok("diff", "true", "false")
    ok("pool", "similarity", "true", "false")


@needs_wild
def test_real_adapters_that_differ_in_fan_in_fan_out_alone_merge() -> None:
    parents = [MORE / f"distilgpt2-fan-in-{flag}" for flag in ("true", "false")]
    ok("merge", *map(str, parents), "-m", "linear", "--weights", "sum", "-o", "out")
    one, two = map(deltas, parents)
    close(deltas(Path("out")), {m: one[m] + two[m] for m in one})
    assert config_of("out")["fan_in_fan_out"] is True


@needs_wild
def test_a_real_null_task_type_stays_null() -> None:
    whisper = MORE / "whisper-null-task-type"
    ok("merge", str(whisper), "-o", "out")
    assert config_of("out")["task_type"] is None
    close(in_peft([Path("out")], [1.0]), deltas(whisper))


def test_byte_identical_parents_are_named_and_merged() -> None:
    for name in ("one", "twin", "triplet"):
        adapter(name, lora_alpha=4)
    adapter("other", seed=2)
    adapter("louder", lora_alpha=8)
    told = ok("merge", "one", "twin", "other", "louder", "triplet", "-m", "linear", "-o", "out").err
    here = Path.cwd().name
    assert f"{here}/one, {here}/twin and {here}/triplet are byte-identical\n" in told
    assert told.count("byte-identical") == 1
    assert "byte-identical" not in ok("merge", "one", "louder", "-o", "apart").err
