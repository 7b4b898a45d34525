"""`lora serve-check` beside the rules of each program, written anew in tests/readers.py."""

import json
from pathlib import Path

import pytest

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
