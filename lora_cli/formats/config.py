"""adapter_config.json of any PEFT version, read as data within limits: typed facts.

Nothing named by a configuration is imported, opened or run; its regular expressions go to RE2 (see `targets`).
"""

import json
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

from lora_cli.errors import ConfigError
from lora_cli.formats.base_names import MAIN
from lora_cli.formats.facts import LoraConfigFacts
from lora_cli.text import shortened

T = TypeVar("T")
D = TypeVar("D")

_CONFIG = "adapter_config.json"
MAX_CONFIG_BYTES = 1_000_000
MAX_DEPTH = 32
MAX_NAME = 1_000
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@lru_cache(maxsize=32)
def parse_config(data: bytes) -> LoraConfigFacts:
    """The facts in the bytes of one adapter_config.json, of any PEFT type and version.

    Raises ConfigError for what is not a JSON object, names one key twice, holds NaN or infinity, nests deeper than
    `MAX_DEPTH`, is longer than `MAX_CONFIG_BYTES`, is a Git LFS pointer, or gives a known key a value of another type.
    """
    raw = parse_json(data)
    take = _Taker(raw)
    peft_type = take("peft_type", _text, "")
    if not peft_type:
        raise ConfigError("adapter_config.json has no peft_type")
    peft_type = peft_type.upper()
    base = take("base_model_name_or_path", _text, "").strip()
    revision = take("revision", _text, "").strip()
    revision = "" if revision == MAIN else revision
    task_type = take("task_type", _text, "")
    if peft_type != "LORA":  # other types use the same keys with other meanings: OFT has r = 0
        return LoraConfigFacts(
            peft_type=peft_type, base=base, revision=revision, task_type=task_type, unknown=take.rest()
        )
    return LoraConfigFacts(
        peft_type=peft_type,
        base=base,
        revision=revision,
        rank=take("r", _positive_int, None),
        alpha=take("lora_alpha", _number, None),
        rslora=take("use_rslora", _flag, False),
        dora=take("use_dora", _flag, False),
        bias=take("bias", _text, "none"),
        lora_bias=take("lora_bias", _flag, False),
        target_modules=take("target_modules", _names_or_regex, ()),
        rank_pattern=take("rank_pattern", _table_of(_positive_int), {}),
        alpha_pattern=take("alpha_pattern", _table_of(_number), {}),
        fan_in_fan_out=take("fan_in_fan_out", _flag, False),
        modules_to_save=take("modules_to_save", _names, ()),
        layers_to_transform=take("layers_to_transform", _layers, False),
        exclude_modules=take("exclude_modules", _names_or_regex, ()),
        task_type=task_type,
        target_parameters=take("target_parameters", _names, ()),
        init=take("init_lora_weights", _init, "false" if "init_lora_weights" in raw else "true"),
        unknown=take.rest(),
    )


def parse_json(data: bytes, what: str = _CONFIG) -> dict[str, Any]:
    """The JSON object in the bytes of a stranger's file, which messages call `what`.

    Raises ConfigError within the limits of `parse_config`.
    """
    try:
        return _parsed(data)
    except ConfigError as error:
        raise ConfigError(error.message.replace(_CONFIG, what), hint=error.hint) from error


def _parsed(data: bytes) -> dict[str, Any]:
    if data.lstrip()[: len(_LFS_POINTER)] == _LFS_POINTER:
        raise ConfigError("config is a Git LFS pointer", hint="the file was never fetched: run `git lfs pull` there")
    if len(data) > MAX_CONFIG_BYTES:
        raise ConfigError(f"adapter_config.json has {len(data):,} bytes; more than {MAX_CONFIG_BYTES:,} is no config")
    try:
        raw = json.loads(
            data.decode("utf-8-sig"), parse_constant=_refuse_constant, object_pairs_hook=_object_without_duplicates
        )
        json.dumps(raw, ensure_ascii=False).encode()
    except ConfigError:
        raise
    except UnicodeError as error:
        raise ConfigError("adapter_config.json is not UTF-8 text") from error
    except RecursionError as error:
        raise ConfigError(f"adapter_config.json nests deeper than {MAX_DEPTH} levels") from error
    except ValueError as error:
        raise ConfigError(f"adapter_config.json is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError("adapter_config.json is not a JSON object")
    _refuse_depth(raw)
    return raw


def _refuse_constant(name: str) -> float:
    raise ConfigError(f"adapter_config.json holds {name}, which is not a number")


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ConfigError(f"adapter_config.json gives {shortened(key)} twice")
            seen.add(key)
    return found


def _refuse_depth(raw: dict[str, Any]) -> None:
    level: list[Any] = [raw]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for value in level
            for child in (value.values() if isinstance(value, dict) else value)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise ConfigError(f"adapter_config.json nests deeper than {MAX_DEPTH} levels")


class _Taker:
    """Reads typed values from a JSON object; the keys that were never read are the rest."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self._raw = dict(raw)

    def __call__(self, key: str, read: Callable[[Any], T], default: D) -> T | D:
        """The value of `key` as `read` returns it; `default` where it is missing or null."""
        value = self._raw.pop(key, None)
        if value is None:
            return default
        try:
            return read(value)
        except _Wrong as wrong:
            raise ConfigError(f"{key} in adapter_config.json must be {wrong}, not {_shown(value)}") from wrong

    def rest(self) -> dict[str, Any]:
        """The keys that were never read, with their values."""
        return self._raw


def _shown(value: Any) -> str:
    return f"the text {shortened(repr(value))}" if isinstance(value, str) else shortened(value)


class _Wrong(Exception):
    """The expected form of a value."""


# Each of the readers below returns its value in the type of its name, or raises _Wrong.


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > MAX_NAME:
        raise _Wrong(f"a text of at most {MAX_NAME} characters")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _Wrong("true or false")
    return value


def _positive_int(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        raise _Wrong("a whole number above 0")
    return value


def _number(value: Any) -> float:
    if not isinstance(value, bool) and isinstance(value, int | float):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
    raise _Wrong("a finite number")


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise _Wrong("a list of names")
    return tuple(dict.fromkeys(value))


def _names_or_regex(value: Any) -> tuple[str, ...] | str:
    if isinstance(value, str):
        return value
    try:
        return _names(value)
    except _Wrong:
        raise _Wrong("a list of names or one text") from None


def _layers(value: Any) -> tuple[int, ...]:
    layers = value if isinstance(value, list) else [value]
    if not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers):
        raise _Wrong("a layer number or a list of them")
    return tuple(layers)


def _init(value: Any) -> str:
    """init_lora_weights: a name, or "true" or "false"."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return _text(value)


def _table_of(read: Callable[[Any], T]) -> Callable[[Any], dict[str, T]]:
    def table(value: Any) -> dict[str, T]:
        if not isinstance(value, dict):
            raise _Wrong("an object")
        try:
            return {key: read(item) for key, item in value.items()}
        except _Wrong as wrong:
            raise _Wrong(f"an object whose values are each {wrong}") from None

    return table
