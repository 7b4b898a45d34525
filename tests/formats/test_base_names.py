"""Which names mean one base model: quantised copies are peeled, real names are left whole, users add to the tables."""

from pathlib import Path

import pytest

from lora_cli.errors import DataError, UsageError
from lora_cli.formats.base_names import canonical_base, is_hub_id, same_base
from lora_cli.settings import user_file
from tests.adapters_on_disk import random_factors, write_adapter
from tests.cli import ok, refused

LLAMA, QWEN, GEMMA = "Llama-3.1-8B-Instruct", "Qwen3-4B-Thinking-2507", "gemma-3-4b-it"
# Name of a copy → name of the model.
COPIES = {
    f"unsloth/{LLAMA}-bnb-4bit": LLAMA,
    f"unsloth/{LLAMA}-unsloth-bnb-4bit": LLAMA,
    f"unsloth/{LLAMA}-unsloth-dynamic-bnb-4bit": LLAMA,
    f"someone/{LLAMA}-bnb-8bit": LLAMA,
    f"someone/{LLAMA}_bnb_4bit": LLAMA,
    f"someone/{LLAMA}-bitsandbytes-4bit": LLAMA,
    f"hugging-quants/Meta-{LLAMA}-AWQ-INT4": f"Meta-{LLAMA}",
    f"hugging-quants/Meta-{LLAMA}-GPTQ-INT4": f"Meta-{LLAMA}",
    f"hugging-quants/Meta-{LLAMA}-BNB-NF4": f"Meta-{LLAMA}",
    f"RedHatAI/{LLAMA}-FP8": LLAMA,
    f"RedHatAI/{LLAMA}-FP8-dynamic": LLAMA,
    f"RedHatAI/{LLAMA}-FP8-Dynamic": LLAMA,
    f"RedHatAI/{LLAMA}-FP8-block": LLAMA,
    f"RedHatAI/{LLAMA}-FP8-Static-Per-Tensor": LLAMA,
    f"RedHatAI/{LLAMA}-quantized.w4a16": LLAMA,
    f"RedHatAI/{LLAMA}-quantized.w8a8": LLAMA,
    f"RedHatAI/{LLAMA}-quantized.w8a16": LLAMA,
    f"RedHatAI/{LLAMA}-w4a16": LLAMA,
    f"RedHatAI/{LLAMA}-W8A8": LLAMA,
    f"RedHatAI/{LLAMA}-NVFP4": LLAMA,
    f"RedHatAI/{LLAMA}-NVFP4A16": LLAMA,
    f"nvidia/{LLAMA}-NVFP4": LLAMA,
    f"nvidia/{LLAMA}-FP4": LLAMA,
    f"nvidia/{LLAMA}-FP8": LLAMA,
    f"amd/{LLAMA}-FP8-KV": LLAMA,
    f"amd/{LLAMA}-MXFP4": LLAMA,
    f"Intel/{LLAMA}-int4-AutoRound": LLAMA,
    f"Intel/{LLAMA}-AutoRound-GPTQ-4bit": LLAMA,
    f"pytorch/{LLAMA}-INT4": LLAMA,
    f"pytorch/{LLAMA}-float8dq": LLAMA,
    f"someone/{LLAMA}-torchao-int4wo": LLAMA,
    f"someone/{LLAMA}-torchao-int8wo": LLAMA,
    f"someone/{LLAMA}-hqq-4bit": LLAMA,
    f"someone/{LLAMA}-HQQ-nf4-g64": LLAMA,
    f"someone/{LLAMA}-EETQ": LLAMA,
    f"someone/{LLAMA}-quanto-int8": LLAMA,
    f"someone/{LLAMA}-exl2-4.0bpw": LLAMA,
    f"someone/{LLAMA}-4.0bpw-h6-exl2": LLAMA,
    f"someone/{LLAMA}-6bpw-exl3": LLAMA,
    f"someone/{LLAMA}-AWQ": LLAMA,
    f"someone/{LLAMA}-GPTQ": LLAMA,
    f"someone/{LLAMA}-GPTQ-4bit-128g": LLAMA,
    f"someone/{LLAMA}-bf16": LLAMA,
    f"someone/{LLAMA}-fp16": LLAMA,
    f"bartowski/{LLAMA}-GGUF": LLAMA,
    f"mradermacher/{LLAMA}-i1-GGUF": LLAMA,
    f"someone/{LLAMA}-Q4_K_M-GGUF": LLAMA,
    f"someone/{LLAMA}-Q8_0-GGUF": LLAMA,
    f"someone/{LLAMA}-UD-Q4_K_XL": LLAMA,
    f"someone/{LLAMA}-IQ4_XS": LLAMA,
    f"mlx-community/{LLAMA}-4bit": LLAMA,
    f"mlx-community/{LLAMA}-8bit-gs32": LLAMA,
    f"mlx-community/{LLAMA}-MLX-4bit": LLAMA,
    f"lmstudio-community/{LLAMA}-MLX-8bit": LLAMA,
    f"mlx-community/{LLAMA}-bf16-mlx": LLAMA,
    f"mlx-community/{QWEN}-4bit-DWQ": QWEN,
    f"mlx-community/{QWEN}-4bit-DWQ-053125": QWEN,
    f"mlx-community/{QWEN}-4bit-AWQ": QWEN,
    f"mlx-community/{QWEN}-nvfp4": QWEN,
    f"mlx-community/{QWEN}-mxfp8": QWEN,
    f"Qwen/{QWEN}-FP8": QWEN,
    "Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4": "Qwen2.5-7B-Instruct",
    "Qwen/Qwen2.5-VL-7B-Instruct-AWQ": "Qwen2.5-VL-7B-Instruct",
    "mlx-community/gpt-oss-20b-MXFP4-Q8": "gpt-oss-20b",
    "unsloth/gpt-oss-20b-BF16": "gpt-oss-20b",
    f"unsloth/{GEMMA}-qat-bnb-4bit": f"{GEMMA}-qat",
    "01-ai/Yi-34B-Chat-8bits": "Yi-34B-Chat",
    "neuralmagic/gemma-2-9b-it-quantized.w4a16-g128": "gemma-2-9b-it",
}
_MODELS = """
phi-4 Phi-3-mini-4k-instruct Phi-3.5-mini-instruct Phi-4-mini-instruct Phi-4-reasoning-plus phi-1_5 phi-2
Llama-3.1-8B-Instruct Llama-3.2-1B Meta-Llama-3-8B Llama-2-7b-hf Llama-2-7b-chat-hf Llama-4-Scout-17B-16E-Instruct
gemma-3-4b-it gemma-3-270m gemma-2-9b-it gemma-3n-E4B-it gemma-3-4b-it-qat-q4_0-unquantized t5gemma-2b-2b-ul2-it
Qwen3-4B-Thinking-2507 Qwen3-30B-A3B Qwen3-Next-80B-A3B-Instruct Qwen2.5-VL-7B-Instruct Qwen2.5-7B-Instruct-1M
Qwen2-0.5B Qwen3-0.6B-Base QwQ-32B Qwen2.5-Coder-1.5B CodeQwen1.5-7B
gpt-oss-20b gpt2 gpt2-medium gpt-j-6B gpt-neox-20b opt-125m bloom-560m bloomz-7b1 pythia-70m-deduped mpt-7b-8k
Mistral-Small-24B-Instruct-2501 Mistral-7B-v0.1 Mistral-7B-Instruct-v0.3 Mixtral-8x7B-Instruct-v0.1 Ministral-8B-2410
DeepSeek-R1-0528-Qwen3-8B DeepSeek-R1-Distill-Qwen-1.5B DeepSeek-V3.1-Terminus deepseek-coder-6.7b-base
SmolLM2-135M SmolLM2-1.7B-Instruct SmolLM3-3B OLMo-2-1124-7B granite-3.3-2b-instruct LFM2-1.2B falcon-7b Falcon-H1-0.5B
MiniCPM-V-2_6 MiniCPM-o-2_6 stablelm-2-1_6b TinyLlama-1.1B-Chat-v1.0 Yi-1.5-9B glm-4-9b-chat GLM-4.5-Air
ERNIE-4.5-21B-A3B-PT Kimi-K2-Instruct-0905 bitnet-b1.58-2B-4T bert-base-uncased roberta-large t5-v1_1-base flan-t5-xl
whisper-large-v3-turbo internlm2-chat-7b Baichuan2-13B-Chat EXAONE-3.5-2.4B-Instruct Hermes-3-Llama-3.1-8B
mobilellm-dynamic rwkv-static RoBERTa-mixed model-kv seq2seq-h8 nomic-q8 mlx
"""
MODELS = _MODELS.split()


def test_the_tables_are_worth_their_name() -> None:
    assert min(len(COPIES), len(set(MODELS))) >= 60


@pytest.mark.parametrize("name", COPIES)
def test_a_quantised_copy_is_named_after_its_model(name: str) -> None:
    owner = name.partition("/")[0]
    assert canonical_base(name) == f"{owner}/{COPIES[name]}"
    assert same_base(name, f"{owner}/{COPIES[name]}")


@pytest.mark.parametrize("name", MODELS)
def test_a_model_keeps_its_whole_name(name: str) -> None:
    assert canonical_base(f"acme/{name}") == f"acme/{name}"
    others = [other for other in MODELS if other != name and same_base(f"acme/{name}", f"acme/{other}")]
    assert not others


def test_a_canonical_name_has_its_owner_and_no_quantised_suffix() -> None:
    assert canonical_base("gpt2") == "openai-community/gpt2"
    assert canonical_base("unsloth/Llama-3.2-1B-bnb-4bit") == "unsloth/Llama-3.2-1B"
    assert canonical_base("D:\\a\\b\\gemma3-270m") == "gemma3-270m"
    assert canonical_base("") == ""


def test_a_mirror_with_other_modules_is_no_twin_and_is_its_own_base() -> None:
    for model in ("phi-4", "Phi-3-mini-4k-instruct", "Phi-3-medium-4k-instruct", "Phi-3.5-mini-instruct"):
        for mirror in (f"unsloth/{model}", f"unsloth/{model}-unsloth-bnb-4bit", f"Unsloth/{model.upper()}-bnb-4bit"):
            assert not same_base(mirror, f"microsoft/{model}")
            assert not same_base(f"microsoft/{model}", mirror)
            assert same_base(mirror, f"unsloth/{model}")
            assert same_base(mirror, f"microsoft/{model}", [f"unsloth/{model}"])
    assert same_base("unsloth/Phi-4-mini-instruct-bnb-4bit", "microsoft/Phi-4-mini-instruct")
    assert same_base("RedHatAI/phi-4-FP8-dynamic", "microsoft/phi-4")


def test_an_endless_name_is_judged_at_once() -> None:
    for name in ("a/" + "-4bit" * 1000, "-4bit" * 1000, "/" * 5000, "a/" + "-" * 5000 + "q4_k"):
        canonical_base(name)
        assert not same_base(name, "acme/tiny")


# The user's own tables -------------------------------------------------------------------------------------------


def users(text: str) -> Path:
    file = user_file().with_name("base_names.toml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def test_a_users_file_adds_to_every_table() -> None:
    before = ("house/tiny-q7x", "acme/tiny"), ("house/odd", "acme/odd"), ("old", "acme/new"), ("disk/tiny", "acme/tiny")
    assert not any(same_base(*pair) for pair in before)
    users(
        'mirrors = ["House"]\ndistinct = ["house/odd"]\nfolders = ["disk"]\nquantised = ["Q#x"]\nbeside = ["v#"]\n'
        '[moved]\nold = "acme/new"\n'
    )
    assert [same_base(*pair) for pair in before] == [True, False, True, True]
    assert same_base("house/tiny-q7x-v2", "acme/tiny")
    assert not is_hub_id("disk/tiny")
    assert same_base("unsloth/tiny-bnb-4bit", "acme/tiny"), "the shipped tables still hold"


def test_the_file_may_lie_elsewhere(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    users('mirrors = ["house"]')
    (own_home / "names.toml").write_text('mirrors = ["other"]')
    monkeypatch.setenv("LORA_BASE_NAMES", "names.toml")
    assert not same_base("house/tiny", "acme/tiny")
    assert same_base("other/tiny", "acme/tiny")
    assert f"base_names\t{own_home / 'names.toml'}\tLORA_BASE_NAMES" in ok("config", "show").out
    monkeypatch.delenv("LORA_BASE_NAMES")
    assert f"base_names\t{user_file().with_name('base_names.toml')}\tdefault" in ok("config", "show").out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mirrors = ", "not TOML"),
        ("mirrors = 'house'", "mirrors is not a list of names"),
        ("mirrors = [1]", "mirrors is not a list of names"),
        ("mirrors = ['']", "mirrors is not a list of names"),
        ("moved = ['gpt2']", "moved is not a table of names"),
        ("[moved]\nold = 3", "moved is not a table of names"),
        ("mirror = ['house']", "unknown table 'mirror'"),
        ("quantised = ['.*']", "quantised holds '.*'"),
        ("beside = ['#']", "beside holds '#'"),
    ],
)
def test_a_malformed_file_is_one_clear_line(own_home: Path, text: str, words: str) -> None:
    write_adapter(own_home / "pool" / "x", random_factors({"layers.0.q_proj": (8, 8)}, 2, seed=0))
    file = users(text)
    message = refused(1, "pool", "sync", "acme/tiny", "--from", "pool")
    assert f"{file}: {words}" in message
    with pytest.raises(DataError):
        same_base("a/b", "c/d")


def test_a_file_that_is_named_has_to_be_there(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_BASE_NAMES", "absent.toml")
    with pytest.raises(DataError, match="no such file"):
        same_base("a/b", "c/d")
    monkeypatch.setenv("LORA_BASE_NAMES", str(own_home))
    with pytest.raises(DataError, match="cannot be read"):
        same_base("a/b", "c/d")
    monkeypatch.setenv("LORA_BASE_NAMES", "~nosuchuser/x")
    with pytest.raises(UsageError, match="LORA_BASE_NAMES must be a path"):
        same_base("a/b", "c/d")
