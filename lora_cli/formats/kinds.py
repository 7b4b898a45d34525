"""Folders and repositories without one adapter of PEFT: their kind, by the names of files and of tensors.

Formats: diffusers (`save_lora_weights`), mlx-lm (`mlx_lm.lora`), AdapterHub (`adapters`), kohya-ss/sd-scripts.
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Final

from lora_cli.errors import DataError, HeaderError
from lora_cli.formats.header import Header, read_header
from lora_cli.text import shortened

CONFIG_NAME: Final = "adapter_config.json"
WEIGHTS_NAME: Final = "adapter_model.safetensors"
DENSE_FILE: Final = "delta.safetensors"
PICKLE_SUFFIXES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

_SUFFIX = ".safetensors"
_OTHERS = {
    "pytorch_lora_weights.safetensors": "diffusers",
    "pytorch_lora_weights.bin": "diffusers",
    "adapters.safetensors": "MLX",
    "adapters.npz": "MLX",
    "pytorch_adapter.bin": "AdapterHub",
    "adapter.safetensors": "AdapterHub",
}
_SHARD = re.compile(r"adapter_model-\d{5}-of-\d{5}\.safetensors")
_WHOLE_MODEL = re.compile(r"(?:(?:tf|pytorch|diffusion_pytorch)_)?model[.-]|consolidated[.-]")
_KOHYA = (".lora_down.weight", ".alpha")
_CHECKPOINT = re.compile(r"(?:checkpoint|step|epoch)[-_]?(\d{1,12})")
_FACTOR = re.compile(r"\.lora_[AB]\.(?:([^.]+)\.)?weight$")


def other_kind(files: Collection[str]) -> str:
    """The kind of adapter that has these files and no adapter_model.safetensors; "" if the names do not show it."""
    names = sorted({file.replace("\\", "/").rpartition("/")[2] for file in files})
    weights = [name for name in names if name.startswith("adapter_model") and name.endswith(_SUFFIX)]
    if shards := [name for name in weights if _SHARD.fullmatch(name)]:
        return f"weights split over {len(shards)} files ({shards[0]}): only whole ones are read"
    if len(weights) > 1:
        return f"{len(weights)} adapters beside each other ({_listed(weights)}): each needs a folder of its own"
    for name in names:
        if program := _OTHERS.get(name):
            return _of_another(program, name)
    for name in names:
        if name.startswith("adapter") and name.lower().endswith(PICKLE_SUFFIXES):
            return f"pickle only ({shortened(name)}): never opened"
    return ""


def kind_in(folder: Path, files: Collection[str]) -> str:
    """`other_kind` of a folder's files; if the names do not show it, by the tensors of its safetensors files."""
    if kind := other_kind(files):
        return kind
    for name in sorted(files):
        lora = name.endswith(_SUFFIX) and name != WEIGHTS_NAME and not _WHOLE_MODEL.match(name)
        if lora and (folder / name).is_file():
            try:
                header = read_header(folder / name)
            except (HeaderError, DataError):
                continue
            if kind := _by_tensors(header, name):
                return kind
    return ""


def checkpoints_in(folder: Path) -> list[str]:
    """The names of a training's checkpoints in a folder that hold adapters, in the order of their steps."""
    found: dict[str, int] = {}
    try:
        for path in folder.iterdir():
            step = _CHECKPOINT.fullmatch(path.name)
            if step and path.is_dir() and holds_adapter(path, [file.name for file in path.iterdir()]):
                found[path.name] = int(step[1])
    except OSError:
        return []
    return sorted(found, key=lambda name: found[name])


def holds_adapter(folder: Path, files: Collection[str]) -> bool:
    """Whether a folder with these files holds an adapter, of PEFT or of another kind, sound or broken."""
    if any(name == CONFIG_NAME or name.startswith("adapter_model.") for name in files):
        return True
    return bool(kind_in(folder, files))


def _by_tensors(header: Header, file: str) -> str:
    if any(tensor.endswith(_KOHYA) for tensor in header.tensors):
        return _of_another("kohya", file)
    if any(_FACTOR.search(tensor) for tensor in header.tensors):
        return f"LoRA weights under another name ({shortened(file)}): PEFT's is {WEIGHTS_NAME}"
    return ""


def _of_another(program: str, file: str) -> str:
    return f"an adapter of {program} ({shortened(file)}), not of PEFT"


def _listed(names: list[str]) -> str:
    return shortened(", ".join(names))
