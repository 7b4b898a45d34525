"""A base whose files are broken ends every command with one line that names the file and the fault."""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from lora_cli.errors import LoraError
from lora_cli.formats.header import MAX_HEADER_BYTES
from lora_cli.models.ref import load
from lora_cli.records import Example
from lora_cli.steps.bake.plan import find_base
from tests.adapters_on_disk import random_factors, write_adapter
from tests.cli import lora, ok
from tests.tiny_bases import saved, tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")

Change = Callable[[Path], object]
INDEX = "model.safetensors.index.json"
PARTS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = saved(tmp_path_factory.mktemp("whole") / "base")
    GenerationConfig(eos_token_id=2).save_pretrained(folder)
    return folder


def bytes_of(name: str, data: bytes) -> Change:
    return lambda base: (base / name).write_bytes(data)


def half(name: str) -> Change:
    return lambda base: (base / name).write_bytes((base / name).read_bytes()[: (base / name).stat().st_size // 2])


def gone(name: str) -> Change:
    return lambda base: (base / name).unlink()


def instead(name: str, make: Callable[[Path], object]) -> Change:
    def change(base: Path) -> None:
        (base / name).unlink()
        make(base / name)

    return change


def with_keys(name: str, *drop: str, **keys: Any) -> Change:
    def change(base: Path) -> None:
        file = base / name
        found = {key: value for key, value in json.loads(file.read_text()).items() if key not in drop}
        file.write_text(json.dumps(found | keys))

    return change


def split(*also: Change) -> Change:
    """Weights in two parts, then the changes of `also`."""

    def change(base: Path) -> None:
        (base / "model.safetensors").unlink()
        tiny_llama().save_pretrained(base, max_shard_size="60KB")
        assert [file.name for file in sorted(base.glob("model-*"))] == [*PARTS]
        for one in also:
            one(base)

    return change


def parts_named(name: Any) -> Change:
    def change(base: Path) -> None:
        index = json.loads((base / INDEX).read_text())
        first, *_ = index["weight_map"]
        index["weight_map"][first] = name
        (base / INDEX).write_text(json.dumps(index))

    return change


def header(length: int, text: bytes = b"") -> Change:
    return bytes_of("model.safetensors", length.to_bytes(8, "little") + text)


CONFIG, TOKENIZER, OPTIONS = "config.json", "tokenizer.json", "tokenizer_config.json"
GENERATION, TEMPLATE, WEIGHTS = "generation_config.json", "chat_template.jinja", "model.safetensors"
IN = f"{CONFIG} sets "

# Fault → the change that makes it, words of the line.
BOTH: dict[str, tuple[Change, str]] = {
    "config missing": (gone(CONFIG), "config.json is missing"),
    "config empty": (bytes_of(CONFIG, b""), "config.json is not JSON"),
    "config a list": (bytes_of(CONFIG, b"[]"), "config.json is not a JSON object"),
    "config null": (bytes_of(CONFIG, b"null"), "config.json is not a JSON object"),
    "config cut": (half(CONFIG), "config.json is not JSON"),
    "config binary": (bytes_of(CONFIG, bytes(range(256))), "config.json is not JSON"),
    "config long": (
        bytes_of(CONFIG, b'{"a": "' + b"x" * 4_000_000 + b'"}'),
        "config.json has more than 4,000,000 bytes",
    ),
    "config deep": (bytes_of(CONFIG, b'{"a":' * 40 + b"1" + b"}" * 40), "config.json nests deeper than 32 levels"),
    "config deeper": (bytes_of(CONFIG, b'{"a":' * 99_999 + b"1" + b"}" * 99_999), "config.json is not JSON"),
    "config a folder": (instead(CONFIG, Path.mkdir), "config.json"),
    "config a pipe": (instead(CONFIG, os.mkfifo), "config.json"),
    "width huge": (with_keys(CONFIG, hidden_size=10**9), f"{IN}hidden_size to 1000000000"),
    "width zero": (with_keys(CONFIG, hidden_size=0), f"{IN}hidden_size to 0"),
    "width a text": (with_keys(CONFIG, hidden_size="32"), f"{IN}hidden_size to '32'"),
    "width a fraction": (with_keys(CONFIG, hidden_size=32.5), f"{IN}hidden_size to 32.5"),
    "width below": (with_keys(CONFIG, hidden_size=-32), f"{IN}hidden_size to -32"),
    "layers many": (with_keys(CONFIG, num_hidden_layers=10**5), f"{IN}num_hidden_layers to 100000"),
    "layers true": (with_keys(CONFIG, num_hidden_layers=True), f"{IN}num_hidden_layers to True"),
    "words many": (with_keys(CONFIG, vocab_size=10**12), f"{IN}vocab_size to 1000000000000"),
    "experts many": (with_keys(CONFIG, num_experts=10**6), f"{IN}num_experts to 1000000"),
    "heads none": (with_keys(CONFIG, num_attention_heads=0), f"{IN}num_attention_heads to 0"),
    "classes many": (with_keys(CONFIG, num_labels=10**9), f"{IN}num_labels to 1000000000"),
    "nested width": (
        with_keys(CONFIG, text_config={"hidden_size": 10**9}),
        f"{IN}text_config.hidden_size to 1000000000",
    ),
    "nested in a list": (with_keys(CONFIG, parts=[{"num_layers": 10**9}]), f"{IN}parts.num_layers to 1000000000"),
    "options cut": (half(OPTIONS), "tokenizer_config.json is not JSON"),
    "options a list": (bytes_of(OPTIONS, b"[1]"), "tokenizer_config.json is not a JSON object"),
    "options a folder": (instead(OPTIONS, Path.mkdir), "tokenizer_config.json is no file"),
    "generation cut": (half(GENERATION), "generation_config.json is not JSON"),
    "generation a list": (bytes_of(GENERATION, b"[]"), "generation_config.json is not a JSON object"),
    "tokenizer cut": (half(TOKENIZER), "tokenizer.json is not JSON"),
    "tokenizer a list": (bytes_of(TOKENIZER, b"[]"), "tokenizer.json is not a JSON object"),
    "tokenizer binary": (bytes_of(TOKENIZER, b"\xff\xfe\xfd"), "tokenizer.json is not JSON"),
    "tokenizer a pipe": (instead(TOKENIZER, os.mkfifo), "tokenizer.json is no file"),
    "template a folder": (instead(TEMPLATE, Path.mkdir), "chat_template.jinja is no file"),
    "a link to nothing": (instead(TEMPLATE, lambda file: file.symlink_to("nothing")), "chat_template.jinja is no file"),
    "a link around": (instead(TEMPLATE, lambda file: file.symlink_to(file.name)), "chat_template.jinja"),
    "weights missing": (gone(WEIGHTS), "has no model.safetensors"),
    "weights empty": (bytes_of(WEIGHTS, b""), "model.safetensors: truncated"),
    "weights cut": (half(WEIGHTS), "model.safetensors: truncated"),
    "weights longer": (
        lambda base: (base / WEIGHTS).write_bytes((base / WEIGHTS).read_bytes() + b"x"),
        "model.safetensors: malformed",
    ),
    "weights a pointer": (
        bytes_of(WEIGHTS, b"version https://git-lfs"),
        "model.safetensors: weights are a Git LFS pointer",
    ),
    "header long": (header(MAX_HEADER_BYTES + 1), "model.safetensors: not a safetensors file"),
    "header a list": (header(2, b"[]"), "model.safetensors: malformed"),
    "weights a folder": (instead(WEIGHTS, Path.mkdir), "model.safetensors is no file"),
    "weights a pipe": (instead(WEIGHTS, os.mkfifo), "model.safetensors is no file"),
    "part missing": (split(gone(PARTS[0])), f"{PARTS[0]} is missing"),
    "part cut": (split(half(PARTS[1])), f"{PARTS[1]}: truncated"),
    "parts exchanged": (
        split(lambda base: (base / PARTS[0]).write_bytes((base / PARTS[1]).read_bytes())),
        f"is not in {PARTS[0]}",
    ),
    "index cut": (split(half(INDEX)), f"{INDEX} is not JSON"),
    "index a list": (split(bytes_of(INDEX, b"[]")), f"{INDEX} is not a JSON object"),
    "index without a map": (split(bytes_of(INDEX, b"{}")), f"{INDEX} has no weight_map"),
    "map a list": (split(bytes_of(INDEX, b'{"weight_map": ["a"]}')), f"{INDEX} has no weight_map"),
    "map of numbers": (split(parts_named(1)), f"{INDEX} names 1, which is no file beside it"),
    "map of a pickle": (split(parts_named("pytorch_model.bin")), "names pytorch_model.bin, which is no file beside it"),
    "map upwards": (split(parts_named("../x.safetensors")), "names ../x.safetensors, which is no file beside it"),
    "map to the root": (split(parts_named("/x.safetensors")), "names /x.safetensors, which is no file beside it"),
    "part linked out": (
        split(instead(PARTS[0], lambda file: file.symlink_to("/etc/hostname"))),
        f"{PARTS[0]} is a link to outside its folder",
    ),
    "config linked out": (instead(CONFIG, lambda file: file.symlink_to("/etc/hostname")), "config.json"),
    "pickles alone": (
        lambda base: (base / WEIGHTS).rename(base / "pytorch_model.bin"),
        "pytorch_model.bin only, a pickle, which could run code when it is opened",
    ),
}
# Faults that are seen once a model or a tokenizer is made: bake makes neither.
LOADED: dict[str, tuple[Change, str]] = {
    "kind unknown": (with_keys(CONFIG, model_type="nothing-known"), "its config.json cannot be loaded"),
    "kind a number": (with_keys(CONFIG, model_type=3), "its config.json cannot be loaded"),
    "kind missing": (with_keys(CONFIG, "model_type"), "its config.json cannot be loaded"),
    "a field of another type": (with_keys(CONFIG, rms_norm_eps="small"), "its config.json cannot be loaded"),
    "no field but its kind": (bytes_of(CONFIG, b'{"model_type": "llama"}'), "config.json describes a model of"),
    "width a table": (with_keys(CONFIG, hidden_size={"a": 1}), "its config.json cannot be loaded"),
    "activation unknown": (with_keys(CONFIG, hidden_act="none-such"), "its weights cannot be loaded"),
    "heads that do not fit": (with_keys(CONFIG, num_attention_heads=5), "its config.json cannot be loaded"),
    "width of another model": (with_keys(CONFIG, hidden_size=64), "in its weights and [104, 64] by its config.json"),
    "quantised in no way": (with_keys(CONFIG, quantization_config={"a": 1}), "its weights cannot be loaded"),
    "quantised by a list": (with_keys(CONFIG, quantization_config=[1]), "its config.json cannot be loaded"),
    "quantised by a package": (
        with_keys(CONFIG, quantization_config={"quant_method": "aqlm"}),
        "its weights cannot be loaded",
    ),
    "layers of another model": (with_keys(CONFIG, num_hidden_layers=4), "18 tensors missing from its weights"),
    "width in memory": (with_keys(CONFIG, hidden_size=10**6), "config.json describes a model of"),
    "tokenizer missing": (gone(TOKENIZER), "its tokenizer cannot be loaded"),
    "tokenizer of nothing": (bytes_of(TOKENIZER, b"{}"), "its tokenizer cannot be loaded"),
    "token not an object": (with_keys(TOKENIZER, added_tokens=[1]), "its tokenizer cannot be loaded"),
    "model unknown": (with_keys(TOKENIZER, model={"type": "None"}), "its tokenizer cannot be loaded"),
    "options of another type": (with_keys(OPTIONS, eos_token=5), "tokenizer"),
    "added tokens a list": (with_keys(OPTIONS, added_tokens_decoder=[1]), "its tokenizer cannot be loaded"),
    "class of a model": (with_keys(OPTIONS, tokenizer_class="LlamaModel"), "sets tokenizer_class to LlamaModel"),
    "class of no class": (with_keys(CONFIG, tokenizer_class="AutoTokenizer"), "sets tokenizer_class to AutoTokenizer"),
    "end a text": (with_keys(GENERATION, eos_token_id="2"), "generation_config.json sets eos_token_id to '2'"),
    "end of the model a text": (
        lambda base: (gone(GENERATION)(base), with_keys(CONFIG, eos_token_id="2")(base)),
        "eos_token_id",
    ),
    "template broken": (bytes_of(TEMPLATE, b"{% if %}"), "the chat template of"),
    "template endless": (bytes_of(TEMPLATE, b"{% for a in range(10**9) %}{% endfor %}"), "the chat template of"),
    "template not text": (bytes_of(TEMPLATE, b"\xff\xfe\xfd"), "its tokenizer cannot be loaded"),
    "template a number": (
        lambda base: (gone(TEMPLATE)(base), with_keys(OPTIONS, chat_template=5)(base)),
        "the chat template of",
    ),
}
ALL = BOTH | LOADED
# Faults that an adapter's own shapes would show before.
MISFITS = ("no field but its kind", "width of another model", "width in memory")
CHAT = Example(id="1", prompt="ab", completion="c")


@pytest.fixture
def base(whole: Path, tmp_path: Path) -> Iterator[Path]:
    """A base of its own for the test, which has to end within ten seconds."""
    folder = tmp_path / "base"
    folder.mkdir()
    for file in whole.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    begun = time.monotonic()
    yield folder
    assert time.monotonic() - begun < 10


def test_the_base_of_these_tests_is_whole(whole: Path) -> None:
    assert len(ALL) >= 45
    assert load(str(whole)).encode(CHAT).tokens
    assert find_base(str(whole), announce=print).checkpoint.tensors


def one_line(error: LoraError, words: str) -> None:
    assert words in error.message
    assert "\n" not in error.message
    assert "lora-base-" not in error.message
    assert len(error.message) < 600


@pytest.mark.parametrize("fault", ALL)
def test_a_broken_base_is_one_line(base: Path, fault: str) -> None:
    change, words = ALL[fault]
    change(base)
    with pytest.raises(LoraError) as caught:
        load(str(base)).encode(CHAT)
    one_line(caught.value, words)
    if fault in BOTH:
        with pytest.raises(LoraError) as caught:
            find_base(str(base), announce=print)
        one_line(caught.value, words)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ALL)
def test_a_broken_base_ends_a_command_and_leaves_nothing(base: Path, own_home: Path, fault: str) -> None:
    change, words = ALL[fault]
    change(base)
    task, adapter = base.parent / "task.jsonl", base.parent / "adapter"
    task.write_text('{"prompt": "ab", "completion": "c"}\n' * 5)
    write_adapter(adapter, random_factors({"model.layers.0.mlp.up_proj": (48, 32)}, 2, seed=0), base=str(base))
    data = ("--data", str(task), "--base", str(base))
    verbs = {
        "eval": ("eval", str(adapter), *data),
        "fit": ("fit", str(adapter), *data, "--steps", "2"),
        "train": ("train", *data, "--rank", "2", "--steps", "2"),
    }
    # All load a base by one function, so each fault is played to one of them, in turn, and to bake.
    chosen = [verbs["train" if fault in MISFITS else list(verbs)[list(ALL).index(fault) % 3]]]
    if fault in BOTH:
        chosen.append(("bake", str(adapter), "--base", str(base)))
    for verb in chosen:
        told = lora(*verb)
        assert told.code in (1, 3, 5)
        assert words in told.err
        assert "Traceback" not in told.err
    assert [file for file in own_home.rglob("*") if file.is_file()] == []
    assert [row for row in json.loads(ok("runs", "list", "--json").out)["rows"] if row["status"] == "done"] == []
