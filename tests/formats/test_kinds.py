"""Adapters of other programs, and several where one should be, are listed with what they are, and never skipped."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_cli.catalogue.adapters import Catalogue
from lora_cli.checks.examine import examine
from lora_cli.formats.header import read_header
from lora_cli.formats.kinds import other_kind
from tests.adapters_on_disk import random_factors, write_adapter
from tests.cli import lora, ok, refused
from tests.fake_hub import BASE, FakeHub, lora_files

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MLX = {"fine_tune_type": "lora", "num_layers": 16, "lora_parameters": {"rank": 8, "scale": 20.0}}
ADAPTER_HUB = {"config": {"architecture": "lora", "r": 8}, "model_name": "roberta-base", "hidden_size": 768}
UNET = "lora_unet_down_blocks_0_attentions_0_proj_in"
KOHYA = {f"{UNET}.lora_down.weight": (4, 8), f"{UNET}.lora_up.weight": (8, 4), f"{UNET}.alpha": ()}
PLAIN = {"x.lora_A.weight": (4, 8), "x.lora_B.weight": (8, 4)}
SHARDS = [f"adapter_model-0000{part}-of-00002.safetensors" for part in (1, 2)]
# Files by kind, tensors as shapes; what the reason has to hold.
FOLDERS: dict[str, tuple[dict[str, object], str]] = {
    "diffusers": (
        {"pytorch_lora_weights.safetensors": {"unet.x.lora.down.weight": (4, 8)}},
        "an adapter of diffusers: unet.x has lora.down.weight but no lora.up.weight",
    ),
    "kohya": (
        {"style.safetensors": KOHYA | {"y.diff": (4, 8)}},
        "an adapter of kohya: whole updates beside the factors",
    ),
    "mlx": (
        {CONFIG: MLX, "adapters.safetensors": {"model.layers.0.self_attn.q_proj.lora_a": (8, 4)}},
        "an adapter of mlx-lm: model.layers.0.self_attn.q_proj has lora_a but no lora_b",
    ),
    "hub": (
        {CONFIG: ADAPTER_HUB, "pytorch_adapter.bin": b"\x80\x04", "pytorch_model_head.bin": b"\x80\x04"},
        "an adapter of AdapterHub: pytorch_adapter.bin is a pickle, which can run code: never opened",
    ),
    "hub2": (
        {CONFIG: ADAPTER_HUB, "adapter.safetensors": {"x": (1,)}},
        "an adapter of AdapterHub: tensors that are no factors: x",
    ),
    "shards": (
        {CONFIG: {"peft_type": "LORA"}, **dict.fromkeys(SHARDS, PLAIN), "adapter_model.safetensors.index.json": {}},
        "an adapter of PEFT in parts: x.lora_A.weight is in two parts",
    ),
    "beside": (
        {CONFIG: {"peft_type": "LORA"}, "adapter_model_a.safetensors": PLAIN, "adapter_model_b.safetensors": PLAIN},
        "an adapter of PEFT: 2 adapters beside each other (adapter_model_a.safetensors, adapter_model_b.safetensors)",
    ),
    "renamed": (
        {"mine.safetensors": PLAIN},
        "an adapter of PEFT: no adapter_config.json beside it: the scale of the update is not known",
    ),
    "tune": ({CONFIG: {"peft_type": "LORA"}, "adapter_0.pt": b"PK"}, "pickle only (adapter_0.pt): never opened"),
    "config": ({CONFIG: {"peft_type": "LORA", "lora_alpha": 8}}, f"no {WEIGHTS}"),
}
# By the names of files alone, as on the Hub, other words are found for some.
BY_NAMES = {
    "diffusers": "an adapter of diffusers (pytorch_lora_weights.safetensors), not of PEFT",
    "mlx": "an adapter of MLX (adapters.safetensors), not of PEFT",
    "hub": "an adapter of AdapterHub (pytorch_adapter.bin), not of PEFT",
    "hub2": "an adapter of AdapterHub (adapter.safetensors), not of PEFT",
    "shards": f"weights split over 2 files ({SHARDS[0]}): only whole ones are read",
    "beside": "2 adapters beside each other (adapter_model_a.safetensors, adapter_model_b.safetensors)",
}
NO_ADAPTERS: dict[str, dict[str, object]] = {
    "base": {"config.json": {}, "model.safetensors": PLAIN, "tokenizer.json": {}},
    "parts": {"model-00001-of-00002.safetensors": PLAIN, "model.safetensors.index.json": {}},
    "dense": {"delta.safetensors": {"x.weight": (4, 4)}, "run.json": {}},
    "broken": {"notes.safetensors": b"rubbish"},
    "text": {"README.md": b"LoRA"},
}


def write(folder: Path, files: dict[str, object]) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        elif name.endswith(".safetensors"):
            assert isinstance(content, dict)
            save_file({tensor: torch.ones(shape) for tensor, shape in content.items()}, folder / name)
        else:
            (folder / name).write_text(json.dumps(content))
    return folder


@pytest.fixture
def pool(own_home: Path) -> Path:
    for name, (files, _) in FOLDERS.items():
        write(own_home / "pool" / name, files)
    for name, files in NO_ADAPTERS.items():
        write(own_home / "pool" / name, files)
    return own_home / "pool"


def reasons() -> dict[str, str]:
    found = json.loads(ok("pool", "list", "--json").out)["rows"]
    assert {row["status"] for row in found} == {"unusable"}
    return {row["id"].rpartition("/")[2]: row["reason"] for row in found}


def test_a_tree_lists_adapters_of_every_kind_and_nothing_else(pool: Path) -> None:
    ok("pool", "sync", "acme/tiny", "--from", "pool")
    listed = reasons()
    # Several files that are adapters by themselves are listed one by one.
    for part in "ab":
        assert "lora_alpha is missing" in listed.pop(f"adapter_model_{part}.safetensors")
    assert listed.keys() == FOLDERS.keys() - {"beside"}
    for name, reason in listed.items():
        assert reason.startswith(FOLDERS[name][1]), (name, reason)
    assert f"{len(FOLDERS) + 1} unchanged" in ok("pool", "sync", "acme/tiny", "--from", "pool").err


@pytest.mark.parametrize("name", FOLDERS)
def test_verify_and_merge_say_the_same_of_a_folder(pool: Path, name: str) -> None:
    wanted = FOLDERS[name][1]
    told = lora("pool", "verify", f"./pool/{name}")
    assert (told.code, wanted in told.err) == (5, True), told.err
    message = refused(5, "merge", f"./pool/{name}", "--base", "acme/tiny", "-o", "out")
    assert wanted in message or (name == "config" and WEIGHTS in message)


def test_a_folder_that_was_converted_is_read_again(pool: Path) -> None:
    ok("pool", "sync", "acme/tiny", "--from", "pool")
    (pool / "kohya" / "style.safetensors").unlink()
    assert "1 gone" in ok("pool", "sync", "acme/tiny", "--from", "pool").err
    write(pool / "kohya" / "more", {"a.safetensors": KOHYA})
    save_file({tensor: torch.ones(shape) for tensor, shape in PLAIN.items()}, pool / "renamed" / "mine.safetensors")
    report = ok("pool", "sync", "acme/tiny", "--from", "pool").err
    assert "1 new · 1 changed" in report


def test_several_adapters_in_one_file_are_named(own_home: Path) -> None:
    stem = "base_model.model.model.layers.0.q_proj"
    sides = {"A": (4, 8), "B": (8, 4)}
    names = ("speech", "vision")
    tensors = {f"{stem}.lora_{side}.{name}.weight": shape for name in names for side, shape in sides.items()}
    folder = write_adapter(own_home / "pool" / "two", random_factors({"model.layers.0.q_proj": (8, 8)}, 4, seed=0))
    save_file({tensor: torch.ones(shape) for tensor, shape in tensors.items()}, folder / WEIGHTS)
    ok("pool", "sync", "acme/tiny", "--from", "pool")
    assert reasons() == {"two": "2 adapters in one file (speech, vision)"}
    one = {tensor: shape for tensor, shape in tensors.items() if "speech" in tensor}
    save_file({tensor: torch.ones(shape) for tensor, shape in one.items()}, folder / WEIGHTS)
    facts = examine((folder / CONFIG).read_bytes(), read_header(folder / WEIGHTS))
    assert facts["status"] == "ok"


def test_a_pipe_among_the_files_is_left_alone(pool: Path) -> None:
    os.mkfifo(pool / "base" / "pipe.safetensors")
    ok("pool", "sync", "acme/tiny", "--from", "pool")


def test_the_hub_lists_them_by_the_names_of_their_files(fake: FakeHub, pool: Path) -> None:
    for name in FOLDERS:
        fake.add(f"x/{name}", {file.name: file.read_bytes() for file in (pool / name).iterdir()})
    ok("pool", "sync", BASE, "--no-copies")
    listed = reasons()
    by_tensors = {"kohya", "renamed"}
    for name in FOLDERS.keys() - by_tensors:
        assert listed[name].startswith(BY_NAMES.get(name, FOLDERS[name][1])), (name, listed[name])
    assert {listed[name] for name in by_tensors} == {f"no {CONFIG}"}
    with_config = [name for name, (files, _) in FOLDERS.items() if CONFIG in files]
    assert len(fake.asked) == 1 + 2 * len(with_config), "of each one its configuration at most"
    fake.forget()
    ok("pool", "sync", BASE, "--no-copies")
    assert len(fake.asked) == 1


def test_a_good_adapter_is_one_whatever_lies_beside_it(own_home: Path, fake: FakeHub) -> None:
    folder = write_adapter(own_home / "pool" / "good", random_factors({"model.layers.0.q_proj": (8, 8)}, 4, seed=0))
    write(folder / "nested", {"style.safetensors": KOHYA})
    for name in ("adapters.safetensors", "adapter_model_2.safetensors", "pytorch_lora_weights.safetensors"):
        save_file({"x": torch.ones(1)}, folder / name)
    ok("pool", "sync", "acme/tiny", "--from", "pool")
    fake.add("x/good", lora_files() | {"adapters.safetensors": b"", "adapter_model.bin": b""})
    ok("pool", "sync", BASE)
    with Catalogue(Path(os.environ["LORA_DB"])) as catalogue:
        assert [row.id for row in catalogue.find(status="ok")] == ["pool/good", "x/good"]


def test_names_that_tell_nothing_are_no_kind() -> None:
    for names in ([], ["README.md"], ["training_args.bin", "optimizer.pt"], [CONFIG], ["model.safetensors"], [WEIGHTS]):
        assert other_kind(names) == ""
    assert "…" in other_kind([f"adapter_model_{'x' * 200}{part}.safetensors" for part in "ab"])
