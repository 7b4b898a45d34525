"""Loading a base reads the files of its version and no others; no key of its files chooses code or asks the network."""

import json
import shutil
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, GenerationConfig

from lora_cli.errors import Refused
from lora_cli.formats.base_files import TEMPLATES, base_files, read_config
from lora_cli.formats.checkpoint import version_of_folder
from lora_cli.models import skeleton as skeletons
from lora_cli.models.ref import load, load_encoder, pin
from lora_cli.models.skeleton import config_of, skeleton
from lora_cli.models.staged import staged
from lora_cli.records import Example
from lora_cli.steps.bases import skeleton_of
from tests.fake_hub import FakeHub
from tests.tiny_bases import saved, tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLE = Example(id="1", prompt="abc", completion="de")
_opened: list[str] | None = None


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None and isinstance(arguments[0], str):
        _opened.append(arguments[0])


sys.addaudithook(_listen)  # Python cannot remove one, so it listens only while `_opened` is a list


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in two parts, with every kind of file beside them."""
    folder = tmp_path_factory.mktemp("whole") / "base"
    saved(folder)
    (folder / "model.safetensors").unlink()
    tiny_llama().save_pretrained(folder, max_shard_size="60KB")
    GenerationConfig(eos_token_id=2).save_pretrained(folder)
    (folder / TEMPLATES).mkdir()
    (folder / TEMPLATES / "tools.jinja").write_text("{{ messages }}")
    for name, text in {"special_tokens_map.json": "{}", "added_tokens.json": "{}", "chat_template.json": "{}"}.items():
        (folder / name).write_text(text)
    for name in ("README.md", "pytorch_model.bin", "modeling_own.py", "adapter_config.json", "training.log"):
        (folder / name).write_bytes(b"not read")
    return folder


def copy(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "base")


def changed(file: Path, **keys: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


@pytest.fixture(scope="module")
def likelihood(whole: Path) -> float:
    return load(str(whole)).log_likelihoods([EXAMPLE])[0]


def test_every_file_that_loading_opens_is_in_the_version(whole: Path, tmp_path: Path) -> None:
    global _opened
    _opened = []
    base = load(str(whole))
    base.encode(EXAMPLE)
    load_encoder(str(whole)).encode(EXAMPLE)
    names, _opened = _opened, None
    covered = {file.resolve() for file in base_files(whole)}
    inside = {found for name in names if (found := Path(name).resolve()).is_relative_to(whole.resolve())}
    assert {file.name for file in inside} >= {"config.json", "tokenizer.json", "model.safetensors.index.json"}
    assert inside <= covered
    # Libraries in Rust open files unheard: what transformers was shown bounds these too.
    parts = [file.name for file in whole.glob("*.safetensors")]
    with staged(whole, "base", weights=parts) as place:
        shown = {file for file in place.rglob("*") if not file.is_dir()}
        assert {file.relative_to(place) for file in shown} == {file.relative_to(whole) for file in base_files(whole)}
    version = version_of_folder(whole)
    for number, file in enumerate(base_files(whole)):
        other = shutil.copytree(whole, tmp_path / str(number))
        with (other / file.relative_to(whole)).open("ab") as more:
            more.write(b" ")
        assert version_of_folder(other) != version, file.name


def test_the_version_of_an_ordinary_base_is_that_of_the_names_and_hashes_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text("a card")
    # sha256 of "config.json\n", sha256 of "{}" and "\n", computed with sha256sum
    assert version_of_folder(tmp_path) == "fc1b84284b530fc0b8f08e79e7207974a1bb7ad1"


KERNEL = "acme/kernel"
CHOOSING: Mapping[str, Mapping[str, Any]] = {
    "config.json": {
        "attn_implementation": KERNEL,
        "_attn_implementation": KERNEL,
        "_attn_implementation_internal": KERNEL,
        "_attn_implementation_autoset": True,
        "experts_implementation": KERNEL,
        "_experts_implementation": {"": KERNEL},
        "dtype": "nonsense",
        "torch_dtype": "load",
        "auto_map": {"AutoConfig": "modeling_own.Own", "AutoModelForCausalLM": "acme/own--modeling_own.Own"},
        "transformers_weights": "adapter_model.bin",
        "configuration_files": ["config.4.0.0.json"],
        "kernel_config": {"a": KERNEL},
        "use_kernels": True,
        "fusion_config": {"none-such": True},
        "distributed_config": {"tp_plan": "auto"},
        "name_or_path": "acme/other",
        "_name_or_path": "acme/other",
        "_commit_hash": "0" * 40,
        "extra_files": ["pytorch_model.bin"],
        "checkpoint_path": "pytorch_model.bin",
    },
    "tokenizer_config.json": {
        "tokenizer_file": "OUTSIDE",
        "vocab_file": "OUTSIDE",
        "merges_file": "OUTSIDE",
        "spm_file": "OUTSIDE",
        "gguf_file": "OUTSIDE",
        "special_tokens_map_file": "OUTSIDE",
        "vocab": "OUTSIDE",
        "merges": "OUTSIDE",
        "init_inputs": ["OUTSIDE"],
        "fast_tokenizer_files": ["../outside/tokenizer.4.0.0.json"],
        "name_or_path": "acme/other",
        "trust_remote_code": True,
        "is_local": False,
        "local_files_only": False,
    },
    "generation_config.json": {"custom_generate": KERNEL, "temperature": "hot", "cache_implementation": KERNEL},
}


@pytest.mark.parametrize(
    "choosing",
    [
        pytest.param(CHOOSING, id="all at once"),
        *(
            pytest.param({file: {key: value}}, id=key, marks=pytest.mark.slow)
            for file, keys in CHOOSING.items()
            for key, value in keys.items()
        ),
    ],
)
def test_no_key_of_a_base_chooses_code_files_or_precision(
    whole: Path,
    likelihood: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    choosing: Mapping[str, Mapping[str, Any]],
) -> None:
    global _opened
    folder = copy(whole, tmp_path)
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in ("tokenizer.json", "tokenizer.4.0.0.json"):
        shutil.copy(whole / "tokenizer.json", outside / name)
    for file, keys in choosing.items():
        changed(folder / file, **json.loads(json.dumps(keys).replace("OUTSIDE", str(outside / "tokenizer.json"))))
    reached: list[str] = []
    hub = transformers.integrations.hub_kernels
    for place, name in ((hub, "get_kernel"), (torch, "load"), (socket.socket, "connect")):
        monkeypatch.setattr(place, name, lambda *words, name=name, **more: reached.append(name))
    _opened = []
    found = load(str(folder))
    names, _opened = _opened, None
    assert reached == []
    assert [name for name in names if Path(name).resolve().is_relative_to(outside.resolve())] == []
    assert found.dtype == torch.float32
    assert found.model.config._attn_implementation == "sdpa"
    assert found.log_likelihoods([EXAMPLE])[0] == pytest.approx(likelihood, abs=1e-6)


def test_a_nested_configuration_chooses_no_attention_either(tmp_path: Path) -> None:
    nested = {"model_type": "gemma3_text", "_attn_implementation": KERNEL, "attn_implementation": KERNEL}
    config = {"model_type": "gemma3", "text_config": nested, "vision_config": {"attn_implementation": KERNEL}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with staged(tmp_path, "base", config_alone=True) as place:
        found = config_of(place)
    assert (found.text_config._attn_implementation, found.vision_config._attn_implementation) == (None, None)


@pytest.mark.parametrize("kind", ["detr", "dpt", "vitpose"])
def test_a_configuration_that_names_another_repository_asks_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: asked.append(address))
    config = {"model_type": kind, "backbone": "acme/other", "use_timm_backbone": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert skeleton(tmp_path) is None
    assert asked == []


def test_the_modules_of_a_base_in_the_hubs_cache_are_found_through_its_links(tmp_path: Path) -> None:
    repo = tmp_path / "models--acme--tiny"
    blobs, snapshot = repo / "blobs", repo / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    saved(blobs)
    for number, file in enumerate(sorted(blobs.iterdir())):
        file.rename(blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    found = skeleton(snapshot)
    assert found is not None
    assert found.layers["model.layers.1.mlp.up_proj"] == (48, 32)
    assert load(str(snapshot)).log_likelihoods([EXAMPLE])


@pytest.mark.parametrize("part", ["pytorch_model.bin", "../x.safetensors", "/x.safetensors"])
def test_an_index_on_the_hub_that_names_another_file_is_refused_before_a_part_is_asked_for(
    fake: FakeHub, whole: Path, part: str
) -> None:
    files = {file.name: file.read_bytes() for file in whole.iterdir() if file.is_file()}
    index = json.loads(files["model.safetensors.index.json"])
    index["weight_map"][next(iter(index["weight_map"]))] = part
    fake.add("acme/remote", files | {"model.safetensors.index.json": json.dumps(index).encode()})
    ref = pin("acme/remote")
    with pytest.raises(Refused, match="which is no file beside it"):
        ref.load()
    assert fake.paths(".bin") == fake.paths(".safetensors?") == []
    assert [path for path in fake.paths() if path.endswith(".safetensors")] == []


def test_a_class_of_too_many_modules_is_not_built(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skeletons, "_MOST_MODULES", 20)
    skeletons._built.cache_clear()
    with pytest.raises(Refused, match=r"config\.json describes a model of more than 20 modules"):
        skeleton(whole)


def test_a_merge_says_why_it_checks_no_names_against_an_impossible_base(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 100000}')
    found, why = skeleton_of(str(tmp_path))
    assert found is None
    assert "config.json sets num_hidden_layers to 100000, which must be a whole number from 0 to 2,000" in why


def test_the_largest_models_are_within_the_bounds(tmp_path: Path) -> None:
    largest = {"num_hidden_layers": 2_000, "hidden_size": 1_000_000, "num_experts": 10_000, "vocab_size": 10_000_000}
    largest |= {"max_position_embeddings": 100_000_000, "num_attention_heads": 10_000, "num_key_value_heads": [1, 2]}
    (tmp_path / "config.json").write_text(json.dumps(largest))
    assert read_config(tmp_path, "base") == largest


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_configurations_of_all_classes_of_transformers_are_within_the_bounds(tmp_path: Path) -> None:
    count = 0
    for kind in CONFIG_MAPPING:
        try:
            values = CONFIG_MAPPING[kind]().to_dict()
            (tmp_path / "config.json").write_text(json.dumps(values))
        except Exception:  # some classes cannot be made, or written, without arguments
            continue
        read_config(tmp_path, kind)
        count += 1
    assert count > 700
