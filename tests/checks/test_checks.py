"""Eligible or not, and the one true reason: base model, coverage, what was trained besides, and the weights."""

import hashlib
import json
import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_cli.checks.examine import Facts, examine
from lora_cli.checks.weights import WeightFacts, scan_weights, weight_status
from lora_cli.errors import HeaderError, NothingMatched, Refused
from lora_cli.formats.base_names import same_base
from lora_cli.formats.config import parse_config
from lora_cli.formats.header import Header, parse_header, read_header
from lora_cli.formats.store import AdapterFiles, folder_ref, locate
from lora_cli.hashes import sha256_of
from lora_cli.records import Adapter
from tests.architectures import linear_skeleton
from tests.hostile.corpus import GOOD_CONFIG, MODULE, good_weights, safetensors, tensor, write_corpus

GEMMA = "google/gemma-3-270m-it"
WEIGHTS = good_weights(rank=2, width=3, out=4)
HEADER = parse_header(WEIGHTS, len(WEIGHTS))
SHAPES = {"model.layers.0.self_attn.q_proj": (4, 3), "lm_head": (9, 3)}


def config(**changes: Any) -> bytes:
    return json.dumps({**GOOD_CONFIG, **changes}).encode()


def judged(declared: str | None, asked: str, **more: Any) -> Facts:
    return examine(config(base_model_name_or_path=declared), HEADER, base_name=asked, **more)


def test_a_good_adapter_gives_the_fields_of_its_catalogue_row() -> None:
    facts = examine(config(use_rslora=True), HEADER, file_names=["adapter_model.safetensors"])
    assert facts["status"] == "ok"
    adapter = Adapter(id="a/b", commit="0" * 40, source="hub", repo="a/b", **facts)
    assert adapter.ranks == {"model.layers.0.self_attn.q_proj": 2}
    assert (adapter.rank, adapter.alpha, adapter.scale, adapter.rslora) == (2, 4.0, 4 / 2**0.5, True)
    assert (adapter.modules, adapter.layers, adapter.target_modules) == (1, 1, ("q_proj",))
    assert (adapter.dtype, adapter.parameters, adapter.bytes) == ("F32", 14, len(WEIGHTS))
    assert (adapter.base_declared, adapter.base, adapter.base_match) == ("acme/tiny", "acme/tiny", "exact")


@pytest.mark.parametrize(
    ("settings", "weights", "files", "reason"),
    [
        (None, HEADER, [], "no adapter_config.json"),
        (b"version https://git-lfs.github.com/spec/v1\noid", HEADER, [], "config is a Git LFS pointer"),
        (b"{", HEADER, [], "adapter_config.json is not JSON"),
        (config(), None, ["adapter_model.bin"], "pickle only (adapter_model.bin): never opened"),
        (config(), None, ["sub/adapter_model.pt"], "pickle only (adapter_model.pt): never opened"),
        (config(), None, ["training_args.bin"], "no adapter_model.safetensors"),
        (config(), HeaderError("weights are a Git LFS pointer"), [], "weights are a Git LFS pointer"),
        (config(peft_type="IA3"), HEADER, [], "peft_type is IA3, not LORA"),
        (config(use_dora=True), HEADER, [], "DoRA: weights are rescaled"),
        (config(base_model_name_or_path=None), HEADER, [], "declares no base model"),
        (
            config(base_model_name_or_path=None, auto_mapping={"base_model_class": "ConvNeXt"}),
            HEADER,
            [],
            "declares no base model, only the class ConvNeXt",
        ),
        (config(), parse_header(safetensors({}), 10), [], "no LoRA tensors in its weights"),
    ],
)
def test_an_unusable_adapter_says_why(
    settings: bytes | None, weights: Header | HeaderError | None, files: list[str], reason: str
) -> None:
    facts = examine(settings, weights, file_names=files)
    assert facts["status"] == "unusable"
    assert facts["reason"].startswith(reason)


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ("base_model.model.score.weight", "tensors of a full head saved (score.weight)"),
        (f"{MODULE}.lora_magnitude_vector", "DoRA"),
    ],
)
def test_tensors_beyond_the_factors_are_refused_though_the_configuration_is_silent(extra: str, reason: str) -> None:
    file = safetensors(
        {
            f"{MODULE}.lora_A.weight": tensor("F32", [1, 1], [0, 4]),
            f"{MODULE}.lora_B.weight": tensor("F32", [1, 1], [4, 8]),
            extra: tensor("F32", [1], [8, 12]),
        },
        b"\0" * 12,
    )
    assert examine(config(r=1), parse_header(file, len(file)))["reason"].startswith(reason)


# Base model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("declared", "asked"),
    [
        ("Google/Gemma-3-270M-IT", GEMMA),
        ("gemma3-270m-it", GEMMA),
        ("/content/work/gemma3-270m/google/gemma-3-270m-it", GEMMA),
        ("./gemma3-270m-it/", GEMMA),
        ("D:\\models\\gemma-3-270m-it", GEMMA),
        ("/root/.cache/huggingface/hub/models--google--gemma-3-270m-it/snapshots/0123abcd", GEMMA),
        ("https://huggingface.co/google/gemma-3-270m-it", GEMMA),
        ("unsloth/gemma-3-270m-it", GEMMA),
        ("unsloth/gemma-3-270m-it-unsloth-bnb-4bit", GEMMA),
        ("unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit", "meta-llama/Llama-3.1-8B-Instruct"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"),
        ("hugging-quants/Meta-Llama-3.1-8B-Instruct-AWQ-INT4", "meta-llama/Llama-3.1-8B-Instruct"),
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", "Qwen/Qwen2.5-7B-Instruct"),
        ("RedHatAI/Qwen2.5-7B-Instruct-quantized.w4a16", "Qwen/Qwen2.5-7B-Instruct"),
        ("RedHatAI/Meta-Llama-3.1-8B-Instruct-FP8-dynamic", "meta-llama/Llama-3.1-8B-Instruct"),
        ("models/qwen2.5-7b", "Qwen/Qwen2.5-7B"),
        ("distilgpt2", "distilbert/distilgpt2"),
        ("openai-community/gpt2", "gpt2"),
    ],
)
def test_other_names_of_one_base(declared: str, asked: str) -> None:
    assert same_base(declared, asked)
    assert same_base(asked, declared)
    facts = judged(declared, asked)
    assert (facts["base_match"], facts["base"], facts["status"]) == ("alias", asked, "ok")


@pytest.mark.parametrize(
    ("declared", "asked"),
    [
        ("google/gemma-3-270m", GEMMA),
        ("google/gemma-3-270m-it-abliterated", GEMMA),
        ("someone/gemma-3-270m-it", GEMMA),
        ("meta-llama/Llama-3-18B", "meta-llama/Llama-3.1-8B"),
        ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B-Instruct"),
        ("gpt2", "someone/gpt2"),
        ("unsloth/gemma-3-270m-bnb-4bit", GEMMA),
    ],
)
def test_another_base_is_a_mismatch_even_when_the_shapes_fit(declared: str, asked: str) -> None:
    assert not same_base(declared, asked)
    facts = judged(declared, asked, skeleton=linear_skeleton(SHAPES))
    assert facts["base_match"] == "mismatch"
    assert facts["reason"] == f"wrong base: declares {declared}, asked for {asked}"


def test_a_folder_of_unknown_name_whose_shapes_fit_is_used_only_when_the_user_vouches_for_it() -> None:
    facts = judged("./gemma3-270m", GEMMA, skeleton=linear_skeleton(SHAPES))
    assert (facts["base_match"], facts["status"]) == ("shape", "unusable")
    fits = f"declares base ./gemma3-270m, not {GEMMA}, but the shapes match"
    assert facts["reason"] == f"{fits}: if both are the same model, accept it with --alias"
    assert judged("./gemma3-270m", GEMMA)["base_match"] == "unknown"

    vouched = judged("./gemma3-270m", GEMMA, skeleton=linear_skeleton(SHAPES), base_aliases=["gemma3-270m"])
    assert (vouched["base_match"], vouched["base"], vouched["status"]) == ("alias", GEMMA, "ok")


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        (
            {"model.layers.0.self_attn.q_proj": (4, 5)},
            "shapes differ from base at model.layers.0.self_attn.q_proj: (4, 3) here, (4, 5) there",
        ),
        ({"lm_head": (9, 3)}, "targets match no module of the base (such as model.layers.0.self_attn.q_proj)"),
    ],
)
def test_the_right_name_does_not_help_where_the_shapes_do_not_fit(
    shapes: dict[str, tuple[int, int]], reason: str
) -> None:
    facts = judged(GEMMA, GEMMA, skeleton=linear_skeleton(shapes))
    assert (facts["base_match"], facts["status"], facts["reason"]) == ("exact", "unusable", reason)
    elsewhere = judged("./mine", GEMMA, skeleton=linear_skeleton(shapes))
    assert (elsewhere["base_match"], elsewhere["reason"]) == (
        "mismatch",
        f"wrong base: declares ./mine, asked for {GEMMA}; {reason}",
    )


# Weights -----------------------------------------------------------------------------------------------------------


def weights(path: Path, *factors: tuple[np.ndarray, np.ndarray], dtype: str = "F32") -> Header:
    """Write modules m.0, m.1, … with these (B, A)."""
    header: dict[str, object] = {}
    body = b""
    for place, (b, a) in enumerate(factors):
        for side, matrix in (("A", a), ("B", b)):
            if dtype == "BF16":
                data = (matrix.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
            else:
                data = matrix.astype({"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]).tobytes()
            name = f"base_model.model.m.{place}.q_proj.lora_{side}.weight"
            header[name] = tensor(dtype, list(matrix.shape), [len(body), len(body) + len(data)])
            body += data
    path.write_bytes(safetensors(header, body))
    return read_header(path)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("shape", [(50, 4, 30), (3, 8, 5), (3, 4, 9), (70_000, 64, 2), (5, 6, 400_000)])
def test_the_norm_is_that_of_the_whole_update(tmp_path: Path, dtype: str, shape: tuple[int, int, int]) -> None:
    out, rank, width = shape
    random = np.random.default_rng(0)
    # Halves of small whole numbers are exact in every precision.
    b, a = random.integers(-8, 9, (out, rank)) / 2.0, random.integers(-8, 9, (rank, width)) / 2.0
    path = tmp_path / "adapter_model.safetensors"
    header = weights(path, (b, a), (2 * b, a), dtype=dtype)

    found = scan_weights(path, header, parse_config(config(lora_alpha=3, use_rslora=True, r=rank)))

    assert found.norm == pytest.approx(3 / rank**0.5 * np.linalg.norm(b @ a) * 5**0.5, rel=1e-12)
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() == sha256_of(path)
    assert weight_status(found)[0] == ("ok" if found.norm <= 1000 else "unusable")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_nan_and_infinity_are_found_and_named(tmp_path: Path, bad: float, side: int) -> None:
    good = (np.ones((4, 2)), np.ones((2, 3)))
    broken = (np.ones((4, 2)), np.ones((2, 3)))
    broken[side][1, 1] = bad
    path = tmp_path / "adapter_model.safetensors"
    found = scan_weights(path, weights(path, good, broken, dtype="BF16"), parse_config(config()))
    assert (found.nonfinite_module, found.norm) == ("m.1.q_proj", None)
    assert weight_status(found) == ("unusable", "NaN or Inf in m.1.q_proj")


def test_an_untrained_adapter_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    zero_b = scan_weights(path, weights(path, (np.zeros((4, 2)), np.ones((2, 3)))), parse_config(config()))
    assert weight_status(zero_b) == ("unusable", "every lora_B is zero: changes nothing")
    zero_a = scan_weights(path, weights(path, (np.ones((4, 2)), np.zeros((2, 3)))), parse_config(config()))
    assert weight_status(zero_a) == ("unusable", "the update is zero in every module: changes nothing")


def test_a_barely_trained_adapter_is_kept_and_an_absurd_one_is_not(tmp_path: Path) -> None:
    assert weight_status(WeightFacts("", 0.007, None, zero=False, zero_b=False)) == ("ok", "")
    path = tmp_path / "adapter_model.safetensors"
    huge = (np.full((4, 2), 1e200), np.full((2, 3), 1e200))
    found = scan_weights(path, weights(path, huge, dtype="F64"), parse_config(config()))
    assert weight_status(found) == ("unusable", "the norm of its update is not finite, above 1000")
    at_most = WeightFacts("", 1000.0, None, zero=False, zero_b=False)
    assert weight_status(at_most) == ("ok", "")
    assert weight_status(replace(at_most, norm=math.nextafter(1000.0, 2000.0)))[0] == "unusable"
    assert weight_status(WeightFacts("", 5e4, None, zero=False, zero_b=False))[1].endswith("is 5e+04, above 1000")


def test_a_file_that_changed_after_its_header_was_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    header = weights(path, (np.ones((4, 2)), np.ones((2, 3))))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(Refused, match="has changed"):
        scan_weights(path, header, parse_config(config()))


def test_a_factor_larger_than_memory_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    width = 2**27
    file = safetensors(
        {
            "base_model.model.q_proj.lora_A.weight": tensor("BF16", [1, width], [0, 2 * width]),
            "base_model.model.q_proj.lora_B.weight": tensor("BF16", [1, 1], [2 * width, 2 * width + 2]),
        }
    )
    path.write_bytes(file)
    with path.open("r+b") as sparse:
        sparse.truncate(len(file) + 2 * width + 2)
    with pytest.raises(Refused, match="over the safety limit"):
        scan_weights(path, read_header(path), parse_config(config()))


# Files -------------------------------------------------------------------------------------------------------------


def test_a_folder_is_named_and_pinned_by_what_it_holds(tmp_path: Path) -> None:
    folder = tmp_path / "tree" / "one"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_bytes(config())
    (folder / "adapter_model.safetensors").write_bytes(WEIGHTS)

    ref = folder_ref(folder)

    assert (ref.id, ref.source, ref.repo) == ("tree/one", "folder", str(folder))
    assert ref.commit == hashlib.sha256(config() + hashlib.sha256(WEIGHTS).hexdigest().encode()).hexdigest()[:40]
    assert folder_ref(folder, "mine/one").commit == ref.commit
    assert locate(ref) == AdapterFiles(ref, folder / "adapter_config.json", folder / "adapter_model.safetensors")

    (folder / "adapter_config.json").write_bytes(config(lora_alpha=5))
    assert folder_ref(folder).commit != ref.commit
    (folder / "adapter_model.safetensors").unlink()
    assert locate(ref) is None
    with pytest.raises(NothingMatched, match="no folder"):
        folder_ref(tmp_path / "absent")


def test_an_adapter_of_the_hub_is_looked_up_in_its_cache_by_commit(tmp_path: Path, monkeypatch: Any) -> None:
    from lora_cli.hub import cache as hub
    from lora_cli.records import AdapterRef

    asked = []

    def cached_file(repo: str, filename: str, commit: str) -> Path | None:
        asked.append((repo, filename, commit))
        return tmp_path / filename

    monkeypatch.setattr(hub, "cached_file", cached_file)
    found = locate(AdapterRef(id="o/n:sub", commit="a" * 40, source="hub", repo="o/n", subfolder="sub"))
    assert found is not None
    assert asked == [
        ("o/n", "sub/adapter_config.json", "a" * 40),
        ("o/n", "sub/adapter_model.safetensors", "a" * 40),
    ]


def test_the_hostile_corpus_is_judged_without_a_crash_and_without_opening_a_pickle(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    unusable = {}
    for name, folder in corpus.folders.items():
        folder_ref(folder)
        facts = examine_folder(folder)
        if facts["status"] != "ok":
            unusable[name] = facts["reason"]
            assert facts["reason"]
    assert not corpus.canary.exists()
    assert unusable["pickle alone"] == "pickle only (adapter_model.bin): never opened"
    fine = set(corpus.folders) - set(unusable)
    assert all(name.startswith("config: ") or name == "pickle beside a good adapter" for name in fine)
    assert len(fine) == 7

    with (corpus.folders["pickle alone"] / "adapter_model.bin").open("rb") as bomb:
        pickle.load(bomb).close()
    assert corpus.canary.exists(), "the pickle must go off when it is opened, or this test shows nothing"


def examine_folder(folder: Path) -> Facts:
    settings = folder / "adapter_config.json"
    path = folder / "adapter_model.safetensors"
    header: Header | HeaderError | None = None
    if path.exists():
        try:
            header = read_header(path)
        except HeaderError as error:
            header = error
    return examine(
        settings.read_bytes() if settings.exists() else None,
        header,
        file_names=[file.name for file in folder.iterdir()],
    )
