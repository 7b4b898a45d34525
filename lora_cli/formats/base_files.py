"""The files of a base model in a folder, and the sizes in its configuration, judged before a library reads them."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from lora_cli.errors import Refused
from lora_cli.files import read_regular, unreadable
from lora_cli.text import shortened

CONFIG: Final = "config.json"
TEMPLATES: Final = "additional_chat_templates"
AGAIN: Final = "download the base model again"
OBJECTS: Final = (
    *(CONFIG, "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json"),
)
"""The files that hold a JSON object in every base that has them."""

_READ: Final = frozenset(
    (
        *(".bpe", ".codes", ".jinja", ".json", ".model", ".safetensors", ".spm"),
        *(".tiktoken", ".tokenizer", ".txt", ".vocab"),
    )
)
# Mistral's tokenizers carry their version as a suffix.
_NUMBERED: Final = "tokenizer.model."
_TERMS: Final = frozenset(("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY"))
_MOST_BYTES: Final = {CONFIG: 4_000_000}
_MOST_BYTES_OF_OTHERS: Final = 1 << 28
_DEEPEST: Final = 32

_MOST: Final = (
    (re.compile(r"(?:^|_)(?:layers?|depths?)$"), 2_000),
    (re.compile(r"experts$"), 100_000),
    (re.compile(r"heads?$"), 100_000),
    (re.compile(r"^num_labels$|(?:hidden|intermediate|embedding)_size|(?:^|_)dim$|^d_|^n_embd$|^n_inner$"), 1_000_000),
    (re.compile(r"^(?:num|n)_|_sizes?$"), 1_000_000_000),
)
"""The largest value of a number, by its key."""
_LEAST: Final = dict.fromkeys(
    ("hidden_size", "n_embd", "d_model", "vocab_size", "num_attention_heads", "num_key_value_heads", "n_head"), 1
) | dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "intermediate_size", "num_experts"), 0)
"""The numbers that are whole wherever they are given, and the smallest of each."""
_NO_SIZES: Final = frozenset(("quantization_config", "label2id", "id2label", "task_specific_params"))


def _is_read(file: Path) -> bool:
    """Whether loading a base may read a file of this name: neither an adapter beside the base nor a hidden file."""
    known = file.suffix in _READ or file.name.startswith(_NUMBERED)
    return known and not file.name.startswith(("adapter_", "."))


def base_files(folder: Path, name: str = "") -> list[Path]:
    """The files that loading may read, sorted by name; `name` is the base's name in messages.

    Raises:
        Refused: one that is no file, or a link to outside the folder. DataError: the folder cannot be read.
    """
    templates = folder / TEMPLATES
    try:
        found = [*folder.iterdir(), *(templates.glob("*.jinja") if templates.is_dir() else ())]
    except OSError as error:
        raise unreadable(folder, error) from error
    return _demand_inside(folder, sorted(file for file in found if _is_read(file)), name)


def files_beside(folder: Path, name: str) -> tuple[Path, ...]:
    """The files beside the weights, sorted: configuration, tokenizer, template, licence. Raises as `base_files`."""
    terms = [file for file in files_in(folder) if file.stem.upper() in _TERMS]
    return tuple(sorted(going_along({*base_files(folder, name), *_demand_inside(folder, terms, name)})))


def going_along(files: Iterable[Path]) -> list[Path]:
    """Those of a base's `files`, relative or not, that belong to its weights."""
    return [file for file in files if _goes_along(file)]


def _goes_along(file: Path) -> bool:
    if file.parent.name == TEMPLATES:
        return file.suffix == ".jinja"
    # Skip weight indices, which are written anew, and the record of an earlier run.
    foreign = file.name.endswith(".index.json") or file.name == "run.json"
    return file.stem.upper() in _TERMS or (_is_read(file) and file.suffix != ".safetensors" and not foreign)


def files_in(folder: Path) -> list[Path]:
    """The files in a folder, sorted by name. DataError where it cannot be read."""
    try:
        return sorted(file for file in folder.iterdir() if file.is_file())
    except OSError as error:
        raise unreadable(folder, error) from error


def _demand_inside(folder: Path, files: list[Path], name: str) -> list[Path]:
    """`files` of a base. Refused for one that is no file, or a link to outside the folder."""
    here = folder.resolve()
    # In the Hub client's cache every file is a link to a blob.
    blobs = here.parent.parent / "blobs" if here.parent.name == "snapshots" else here
    for file in files:
        try:
            is_file = file.is_file()  # false for a link to itself, which cannot be resolved
        except OSError as error:
            raise unreadable(file, error) from error
        if not is_file:
            raise Refused(f"{name or folder}: {file.name} is no file", hint=AGAIN)
        target = file.resolve()
        if not (target.is_relative_to(here) or target.is_relative_to(blobs)):
            raise Refused(
                f"{name or folder}: {file.name} is a link to outside its folder", hint="put the file itself there"
            )
    return files


def json_object(path: Path, name: str) -> dict[str, Any]:
    """The object in a JSON file of a base; `name` is the base's name in messages.

    Raises:
        Refused: too long, not JSON, not an object, or nested too deep. DataError: it cannot be read.
    """
    most = _MOST_BYTES.get(path.name, _MOST_BYTES_OF_OTHERS)
    try:
        data = read_regular(path, most + 1)
    except OSError as error:
        raise unreadable(path, error) from error
    if len(data) > most:
        raise Refused(f"{name}: {path.name} has more than {most:,} bytes", hint=AGAIN)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Refused(f"{name}: {path.name} is not JSON", hint=AGAIN) from error
    if not isinstance(value, dict):
        raise Refused(f"{name}: {path.name} is not a JSON object", hint=AGAIN)
    if _depth(value) > _DEEPEST:
        raise Refused(f"{name}: {path.name} nests deeper than {_DEEPEST} levels", hint=AGAIN)
    return value


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """A base's configuration with sizes that a model can have. Raises as `json_object`, and Refused for others."""
    config = json_object(folder / CONFIG, name)
    for key, value in _sizes(config):
        if demand := _unmet(key.rpartition(".")[2], value):
            said = f"sets {shortened(key)} to {shortened(repr(value))}, which must be {demand}"
            raise Refused(f"{name}: {CONFIG} {said}", hint=AGAIN)
    return config


def _sizes(values: Mapping[str, Any], inside: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a configuration by its path, those of lists and tables one by one."""
    for key, value in values.items():
        if isinstance(value, dict):
            if key not in _NO_SIZES:
                yield from _sizes(value, f"{inside}{key}.")
        elif isinstance(value, list) and key not in _NO_SIZES:
            for one in value:
                yield from _sizes(one, f"{inside}{key}.") if isinstance(one, dict) else [(inside + key, one)]
        else:
            yield inside + key, value


def _unmet(key: str, value: Any) -> str:
    """What a value must be by its key, "" if it is."""
    most = next((most for pattern, most in _MOST if pattern.search(key)), None)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if most is None or value is None:
        return ""
    if key in _LEAST:
        is_whole = is_number and isinstance(value, int) and _LEAST[key] <= value <= most
        return "" if is_whole else f"a whole number from {_LEAST[key]} to {most:,}"
    return "" if not is_number or -most <= value <= most else f"at most {most:,}"


def _depth(value: Any) -> int:
    """The levels of objects and lists in a value, at most one more than `_DEEPEST`."""
    level, depth = [value], 0
    while level and depth <= _DEEPEST:
        level = [
            child
            for one in level
            for child in (one.values() if isinstance(one, dict) else one)
            if isinstance(child, dict | list)
        ]
        depth += 1
    return depth
