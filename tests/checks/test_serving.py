"""`lora serve-check` beside the rules of each program, written anew in tests/readers.py."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_cli.checks.serving import NAMES
from tests import readers
from tests.adapters_on_disk import random_factors, write_adapter
from tests.cli import lora, ok, refused
from tests.exports.table import EVERY, KINDS, LLAMA, Kind
from tests.readers import READERS, Refuses
from tests.steps.test_merge import close

PROGRAMS = {
    "llama.cpp": "llama.cpp",
    "lmdeploy": "lmdeploy",
    "lorax": "LoRAX",
    "olive": "Olive",
    "openvino": "OpenVINO GenAI",
    "peft": "PEFT",
    "sglang": "SGLang",
    "tensorrt-llm": "TensorRT-LLM",
    "transformers": "transformers",
    "vllm": "vLLM",
}


@pytest.fixture(autouse=True)
def home(own_home: Path) -> None:
    Path("base").mkdir()
    Path("base/config.json").write_text(json.dumps(LLAMA))


def verdict_of(program: str, folder: Path) -> str:
    """Right, wrong or refused by the rules of tests/readers.py."""
    try:
        found = READERS[PROGRAMS[program]](folder, EVERY)
    except Refuses as why:
        return "wrong" if "uninitialised" in str(why) else "refused"
    try:
        close(found, readers.peft(folder), 1e-5)
    except AssertionError:
        return "wrong"
    return "right"


def test_every_program_has_a_rule_here() -> None:
    assert set(PROGRAMS) == set(NAMES)
    assert set(PROGRAMS.values()) == set(READERS)


@pytest.mark.parametrize("program", NAMES)
@pytest.mark.parametrize("kind", list(KINDS[:8]), ids=lambda kind: kind.title)
def test_the_verdict_is_that_of_the_programs_rules(kind: Kind, program: str) -> None:
    kind.write(Path("mine").absolute())
    wanted = verdict_of(program, Path("mine"))
    told = lora("serve-check", "mine", "--for", program, "--json")
    found = json.loads(told.out)
    assert (found["schema"], found["verdict"]) == ("lora.serve-check/1", wanted)
    assert told.code == (0 if wanted == "right" else 5)
    assert bool(found["reasons"]) == (wanted != "right")
    assert len(told.err.splitlines()) <= 2
    if wanted != "right":
        assert "lora export" in told.err


def test_the_factor_of_each_module_is_told() -> None:
    write_adapter(Path("mine"), random_factors(EVERY, 8, seed=1), base="base", lora_alpha=16, use_rslora=True)
    told = lora("serve-check", "mine", "--for", "llama.cpp", "--json")
    factors = json.loads(told.out)["factors"]
    assert factors.keys() == EVERY.keys()
    assert all(abs(factor - 8**-0.5) < 1e-9 for factor in factors.values())
    assert "applies 14 of 14 modules at 0.354 times their scale" in told.err
    told = lora("serve-check", "mine", "--for", "openvino")
    assert told.out == "wrong\n"


def test_a_scale_of_0_has_no_factor() -> None:
    write_adapter(Path("mine"), random_factors(EVERY, 8, seed=1), base="base", lora_alpha=0)
    told = lora("serve-check", "mine", "--for", "openvino", "--json")
    found = json.loads(told.out, parse_constant=pytest.fail)
    assert (found["verdict"], found["factors"]) == ("wrong", {})
    [reason] = found["reasons"]
    assert reason.startswith("applies 14 modules whose scale is 0 in PEFT, such as model.layers.")
    assert lora("serve-check", "mine", "--for", "llama.cpp").out == "right\n"


def test_what_an_export_makes_is_right_for_its_program() -> None:
    KINDS[4].write(Path("mine").absolute())
    for program in ("vllm", "sglang", "openvino", "peft"):
        ok("export", program, "mine", "-o", f"for-{program}")
        assert ok("serve-check", f"for-{program}", "--for", program).out == "right\n"


def test_a_rank_that_vllm_does_not_load_is_named() -> None:
    shapes = {"model.layers.0.self_attn.q_proj": (32, 32)}
    write_adapter(Path("mine"), random_factors(shapes, 600, seed=1), base="base")
    told = lora("serve-check", "mine", "--for", "vllm")
    assert (told.code, told.out) == (5, "refused\n")
    assert "rank 600 is above 512" in told.err


def test_llama_cpp_holds_linear_layers_that_are_not_tied() -> None:
    for kind in KINDS:
        if kind.title not in ("embeddings", "lm_head tied to the embeddings", "lm_head"):
            continue
        Path("base/config.json").write_text(json.dumps(dict(kind.base)))
        kind.write(Path(f"mine {kind.title}").absolute())
        told = lora("serve-check", f"mine {kind.title}", "--for", "llama.cpp")
        assert told.code == (0 if kind.title == "lm_head" else 5), kind.title


@pytest.mark.parametrize("program", NAMES)
def test_modules_that_are_no_target_are_applied_by_all_but_peft(program: str) -> None:
    targets = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    write_adapter(Path("mine"), random_factors(EVERY, 8, seed=1), base="base", lora_alpha=8, target_modules=targets)
    wanted = verdict_of(program, Path("mine"))
    told = lora("serve-check", "mine", "--for", program)
    assert told.out == f"{wanted}\n"
    assert ("that PEFT leaves out" in told.err) == (wanted == "wrong")
    assert wanted == ("right" if program in ("peft", "transformers") else "wrong")


@pytest.mark.parametrize("program", ["vllm", "llama.cpp", "peft", "transformers"])
def test_modules_saved_whole_are_no_update(program: str) -> None:
    write_adapter(Path("mine"), random_factors(EVERY, 8, seed=1), base="base", modules_to_save=["norm"])
    file = Path("mine/adapter_model.safetensors")
    save_file({**load_file(file), "base_model.model.model.norm.weight": torch.ones(32)}, file)
    told = lora("serve-check", "mine", "--for", program)
    if program in ("peft", "transformers"):
        assert (told.code, told.out) == (0, "right\n")
    else:
        assert (told.code, told.out) == (5, "")
        assert "full weights saved (model.norm.weight)" in told.err


@pytest.mark.parametrize(
    ("config", "verdicts"),
    [
        ({"use_dora": True}, {"vllm": "refused", "peft": "right", "transformers": "", "sglang": ""}),
        ({"lora_bias": True}, {"vllm": "refused", "peft": "right", "transformers": "right", "llama.cpp": ""}),
        ({"init_lora_weights": "pissa"}, {"vllm": "refused", "peft": "", "openvino": ""}),
        ({"bias": "all", "use_dora": True}, {"vllm": "refused", "peft": ""}),
    ],
)
def test_variants_of_lora_are_judged_where_the_rule_is_known(
    config: dict[str, object], verdicts: dict[str, str]
) -> None:
    write_adapter(Path("mine"), random_factors(EVERY, 8, seed=1), base="base", **config)
    for program, wanted in verdicts.items():
        told = lora("serve-check", "mine", "--for", program)
        assert (told.code, told.out) == (0 if wanted == "right" else 5, f"{wanted}\n" if wanted else "")
        assert ("is not known" in told.err) == (not wanted)
        assert "writes a form" not in told.err


def test_an_export_that_refuses_the_adapter_is_no_remedy() -> None:
    kind = next(kind for kind in KINDS if kind.title == "embeddings")
    kind.write(Path("mine").absolute())
    for program in ("llama.cpp", "openvino"):
        assert "refuses it too" in lora("serve-check", "mine", "--for", program).err
    write_adapter(Path("plain"), random_factors(EVERY, 8, seed=1), base="base", lora_alpha=16, use_rslora=True)
    assert "lora export gguf writes a form" in lora("serve-check", "plain", "--for", "llama.cpp").err


def test_no_folder_no_adapter_and_no_such_program() -> None:
    assert "no folder" in refused(3, "serve-check", "absent", "--for", "vllm")
    assert "no adapter_config.json" in refused(5, "serve-check", "base", "--for", "vllm")
    assert "did you mean 'vllm'" in refused(2, "serve-check", "base", "--for", "vlm")


def test_files_of_another_program_are_not_judged_by_their_conversion() -> None:
    next(kind for kind in KINDS if kind.title == "one rank, one alpha").write(Path("mine").absolute())
    ok("export", "mlx", "mine", "-o", "for-mlx")
    for program in ("vllm", "peft"):
        said = refused(5, "serve-check", "for-mlx", "--for", program)
        assert "mlx-lm" in said
        assert "lora convert" in said
