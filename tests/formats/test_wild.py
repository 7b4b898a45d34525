"""Real adapters of real people (../shared/wild): all survive, the unusable ones for the true reason, norms as known."""

import sys
from pathlib import Path
from typing import Any

import pytest

from lora_cli.checks.examine import Facts, examine
from lora_cli.checks.weights import scan_weights, weight_status
from lora_cli.errors import ConfigError
from lora_cli.formats.base_names import same_base
from lora_cli.formats.config import parse_config
from lora_cli.formats.header import read_header
from lora_cli.formats.modules import locate_modules
from lora_cli.formats.store import folder_ref, locate, read_config
from tests.architectures import linear_skeleton
from tests.paths import SHARED

WILD = SHARED / "wild"

pytestmark = pytest.mark.skipif(not WILD.is_dir(), reason=f"the real adapters are not here: no {WILD}")

ADAPTERS = sorted((WILD / "adapters").glob("*/")) if WILD.is_dir() else []
CONFIGS = sorted((WILD / "configs").glob("*.json")) if WILD.is_dir() else []
GEMMA = "google/gemma-3-270m-it"
# Checked with PEFT on bases of the right shape (the README beside the files), to the digits given there.
NORMS = {
    "0112LY__logo-gemma-lora__adapter": "0.007318",
    "BK7195__deltacompression-poc__adapter": "690.2",
    "Lazyy-star__llm-lora-demo__lora_model": "0.02735",
    "abrhaleyarefaine1997__gpt2-tigrinya-lora": "21.44",
    "akseljoonas__biotech-news-sentiment__lora_adapter": "0",
    "anirudh-ak__peft-gpt2__model_lora_model": "121.9",
    "ao-wei__gemma3-270m-svg-lora-partb__adapter": "1.918",
    "ao-wei__gemma3-270m-svg-lora-partb__adapter_seed123": "1.915",
    "fanyihan-max__WorkforLLM__adapter": "1.089",
    "zouhe0__LLM-Homework__adapter": "5.789",
    "justbautista__fine-tuning__emotion_lora_model": "3.042",
    "justbautista__fine-tuning__keywords_lora_model": "3.019",
    "justbautista__fine-tuning__therapist_lora_model": "2.505",
}


def facts_of(folder: Path, **more: Any) -> Facts:
    weights = folder / "adapter_model.safetensors"
    header = read_header(weights) if weights.exists() else None
    return examine(read_config(folder), header, file_names=[file.name for file in folder.iterdir()], **more)


@pytest.mark.parametrize("folder", ADAPTERS, ids=lambda folder: folder.name)
def test_every_real_adapter_is_described_or_refused_for_the_true_reason(folder: Path) -> None:
    reasons = {
        "yoonyerin__be-great": "pickle only (adapter_model.bin): never opened",
        "tommyroar__is-the-mountain-out__train_checkpoints": "declares no base model, only the class ConvNeXt",
        "anirudh-ak__peft-gpt2__model_lora_model": "tensors of a full head saved (score.weight)",
        "sidmahurkar__Udacity_GenAI_Nanodegree__roberta-base-lora": (
            "tensors of a full head saved (classifier.dense.weight)"
        ),
    }
    facts = facts_of(folder)
    assert facts["reason"] == reasons.get(folder.name, "")
    assert facts["status"] == ("unusable" if folder.name in reasons else "ok")
    if folder.name != "yoonyerin__be-great":
        assert facts["modules"] >= 12
        assert facts["rank"] in {1, 4, 8, 16}
        assert facts["scale"] == (facts["alpha"] or 0) / facts["rank"]
        assert facts["parameters"] * 2 < facts["bytes"]


MORE = {
    "distilgpt2-fan-in-false": ("ok", ""),
    "distilgpt2-fan-in-true": ("ok", ""),
    "gemma-2b-nested-prefix": (
        "ok",
        "names repaired: base_model.model.model.layers.0.self_attn.k_proj is model.layers.0.self_attn.k_proj",
    ),
    "unet-no-base": ("unusable", "declares no base model, only the class UNet2DConditionModel"),
    "whisper-null-task-type": ("ok", ""),
}


@pytest.mark.parametrize("name", MORE)
def test_real_adapters_that_each_have_one_fault(name: str) -> None:
    facts = facts_of(WILD / "more" / name)
    assert (facts["status"], facts["notes"] or facts["reason"]) == MORE[name]


def test_keys_that_a_trainer_nested_twice_mean_the_modules_of_the_base() -> None:
    folder = WILD / "more" / "gemma-2b-nested-prefix"
    config = parse_config((folder / "adapter_config.json").read_bytes())
    modules = locate_modules(config, read_header(folder / "adapter_model.safetensors")).modules
    assert set(modules) == {f"model.layers.{n}.self_attn.{name}_proj" for n in range(18) for name in "qkvo"}


def test_one_base_under_four_spellings() -> None:
    found = {folder.name.split("__")[0]: facts_of(folder, base_name=GEMMA) for folder in ADAPTERS}
    matches = {name: facts["base_match"] for name, facts in found.items() if facts["base_match"] != "mismatch"}
    assert matches == {
        "0112LY": "exact",
        "ao-wei": "alias",
        "fanyihan-max": "alias",
        "tommyroar": "unknown",
        "zouhe0": "unknown",
    }
    assert found["zouhe0"]["reason"].endswith(f"not {GEMMA}: if both are the same model, accept it with --alias")
    assert found["BK7195"]["reason"] == f"wrong base: declares cyberagent/open-calm-1b, asked for {GEMMA}"


def test_a_windows_path_fits_by_shape_and_is_accepted_by_alias() -> None:
    (mine,) = [folder for folder in ADAPTERS if folder.name.startswith("zouhe0")]
    (known,) = [folder for folder in ADAPTERS if folder.name == "ao-wei__gemma3-270m-svg-lora-partb__adapter"]
    config = parse_config((known / "adapter_config.json").read_bytes())
    modules = locate_modules(config, read_header(known / "adapter_model.safetensors")).modules
    shapes = {name: (factors.out_features, factors.in_features) for name, factors in modules.items()}

    assert facts_of(mine, base_name=GEMMA, skeleton=linear_skeleton(shapes))["base_match"] == "shape"
    vouched = facts_of(mine, base_name=GEMMA, skeleton=linear_skeleton(shapes), base_aliases=["gemma3-270m"])
    assert (vouched["base_match"], vouched["status"]) == ("alias", "ok")
    gpt2 = {"transformer.h.0.attn.c_attn": (2304, 768)}
    assert facts_of(mine, base_name=GEMMA, skeleton=linear_skeleton(gpt2))["base_match"] == "mismatch"


@pytest.mark.parametrize("name", NORMS)
def test_the_norm_is_the_known_one(name: str) -> None:
    folder = WILD / "adapters" / name
    weights = folder / "adapter_model.safetensors"
    found = scan_weights(weights, read_header(weights), parse_config((folder / "adapter_config.json").read_bytes()))
    assert found.norm is not None
    assert f"{found.norm:.4g}" == NORMS[name]
    zero = name.startswith("akseljoonas")
    assert weight_status(found) == (("unusable", "every lora_B is zero: changes nothing") if zero else ("ok", ""))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem[-60:])
def test_every_real_configuration_is_read_or_named_a_git_lfs_pointer(path: Path) -> None:
    data = path.read_bytes()
    if data.startswith(b"version https://git-lfs"):
        with pytest.raises(ConfigError, match="config is a Git LFS pointer"):
            parse_config(data)
        return
    found = parse_config(data)
    plain = found.peft_type == "LORA" and not any(word in path.stem for word in ("dora", "bdlora", "kasa"))
    assert (found.refusals() == ()) == plain


def test_the_configurations_are_of_39_types_and_two_are_pointers() -> None:
    types = []
    for path in CONFIGS:
        try:
            types.append(parse_config(path.read_bytes()).peft_type)
        except ConfigError:
            types.append("pointer")
    assert len(types) == 179
    assert types.count("pointer") == 2
    assert len(set(types) - {"pointer"}) == 39


def test_quantised_mirrors_in_the_configurations_are_their_base() -> None:
    bases = {parse_config(path.read_bytes()).base for path in CONFIGS if not path.read_bytes().startswith(b"version")}
    mirrors = {base for base in bases if base.startswith("unsloth/")}
    assert mirrors
    assert {base for base in mirrors if same_base(base, "Qwen/Qwen2.5-7B-Instruct")} == {
        "unsloth/Qwen2.5-7B-Instruct-bnb-4bit"
    }


def test_the_pickle_is_never_opened() -> None:
    (folder,) = [folder for folder in ADAPTERS if folder.name == "yoonyerin__be-great"]
    opened = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and (event == "pickle.find_class" or (event == "open" and str(arguments[0]).endswith(".bin"))):
            opened.append((event, str(arguments[0])))

    watching = True
    sys.addaudithook(watch)
    try:
        ref = folder_ref(folder)
        assert locate(ref) is None
        assert facts_of(folder)["reason"] == "pickle only (adapter_model.bin): never opened"
        assert opened == []

        (folder / "adapter_model.bin").open("rb").close()
        assert opened, "opening it must be noticed, or this test shows nothing"
    finally:
        watching = False
