"""A base as transformers may see it: the files of its version and no others, without keys that choose code, offline.

transformers opens more than a base's own files if they say so: an index or a configuration may name other files, and a
configuration may name code that is fetched from the Hub. So transformers gets a folder of links made for the purpose.
"""

import json
import re
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from lora_cli.errors import Refused
from lora_cli.formats.base_files import AGAIN, CONFIG, base_files, json_object, read_config
from lora_cli.hub.cache import offline
from lora_cli.text import shortened

_TOKENIZER: Final = "tokenizer_config.json"
_GENERATION: Final = "generation_config.json"

_OF_CONFIG: Final = re.compile(
    r"_?(?:attn|experts)_implementation(?:_internal|_autoset)?|(?:torch_)?dtype|_?name_or_path|configuration_files"
    r"|transformers_weights|kernel_config|fusion_config|distributed_config|use_kernels|checkpoint_path"
)
"""Keys of a configuration that choose code, precision or files: they are chosen by this tool."""
_OF_TOKENIZER: Final = re.compile(r".*_files?|vocab|merges|init_inputs|tokenizer_object|trust_remote_code")
"""Keys of a tokenizer's configuration that name files or are handed to its class as files."""

_A_TOKENIZER: Final = re.compile(r"(?!Auto)\w*(?:Tokenizer(?:Fast)?|Backend)")


@contextmanager
def staged(folder: Path, name: str, *, weights: Collection[str] = (), config_alone: bool = False) -> Iterator[Path]:
    """While the block runs, a folder with the files of the base in `folder` that loading may read, and no network.

    Args:
        name: the base's name in messages.
        weights: the files of weights to show.
        config_alone: show config.json and nothing else.

    Raises:
        Refused, DataError: see `read_config` and `base_files`; a generation configuration without usable ends.
    """
    rewritten: dict[str, Callable[[Path], Mapping[str, Any]]] = {
        CONFIG: lambda file: _config(read_config(file.parent, name), f"{name}: {CONFIG}"),
        _TOKENIZER: lambda file: _tokenizer(json_object(file, name), f"{name}: {_TOKENIZER}"),
        _GENERATION: lambda file: _ends(json_object(file, name), f"{name}: {_GENERATION}"),
    }
    with tempfile.TemporaryDirectory(prefix="lora-base-") as made, offline():
        for file in [folder / CONFIG] if config_alone else base_files(folder, name):
            place = Path(made, file.relative_to(folder))
            place.parent.mkdir(exist_ok=True)
            if file.name in rewritten:
                place.write_text(json.dumps(rewritten[file.name](file)), encoding="utf-8")
            elif file.suffix != ".safetensors" or file.name in weights:
                place.symlink_to(file.resolve())
        yield Path(made)


def _config(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    _demand_tokenizer(values, where)
    found: dict[str, Any] = _without(_OF_CONFIG, values)
    return found


def _without(keys: re.Pattern[str], value: Any) -> Any:
    """A configuration without some keys, at any depth; what describes a quantisation stays as it is."""
    if isinstance(value, list):
        return [_without(keys, one) for one in value]
    if not isinstance(value, dict):
        return value
    return {
        key: one if key == "quantization_config" else _without(keys, one)
        for key, one in value.items()
        if not keys.fullmatch(key)
    }


def _tokenizer(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    _demand_tokenizer(values, where)
    return {key: value for key, value in values.items() if not _OF_TOKENIZER.fullmatch(key)}


def _demand_tokenizer(values: Mapping[str, Any], where: str) -> None:
    """Refused for a class of something else, which transformers would load as the tokenizer."""
    name = values.get("tokenizer_class")
    if name is not None and not (isinstance(name, str) and _A_TOKENIZER.fullmatch(name)):
        raise Refused(f"{where} sets tokenizer_class to {shortened(name)}, which is no tokenizer", hint=AGAIN)


def _ends(generation: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The tokens that end a generation: all that is used of a generation configuration."""
    ends = generation.get("eos_token_id")
    for one in ends if isinstance(ends, list) else [ends]:
        if one is not None and (not isinstance(one, int) or isinstance(one, bool)):
            raise Refused(f"{where} sets eos_token_id to {shortened(repr(one))}, which is no token id", hint=AGAIN)
    return {"eos_token_id": ends}
