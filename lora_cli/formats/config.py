"""adapter_config.json of any PEFT version, read as data: typed facts, and reasons why an update is not s·B·A.

Nothing named by a configuration is imported, opened or run; its regular expressions go to RE2 (see `targets`). Rules of
scale and of variants: PEFT 0.21 (`peft/tuners/lora/layer.py`, `variants.py`, `peft/utils/other.py:get_pattern_key`).
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, TypeVar

from lora_cli.errors import ConfigError
from lora_cli.formats.base_names import MAIN, at_revision
from lora_cli.formats.targets import SECONDS, Targets, Test, Undecided, fullmatch

T = TypeVar("T")
D = TypeVar("D")

MAX_CONFIG_BYTES = 1_000_000
MAX_DEPTH = 32
MAX_NAME = 1_000
MAX_PATTERN_SHAPES = 512
MAX_REGEX_KEYS = 64
DEFAULT_RANK = 8
"""The rank of a configuration that gives none, as in PEFT."""
TASKS_WITH_A_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
"""Tasks for which PEFT always loads a head, and fails if there is none."""
LFS_POINTER = b"version https://git-lfs.github.com/spec/"

_PLAIN_INITS = ("true", "false", "gaussian", "eva", "orthogonal", "mica")
_BASE_CHANGING_INITS = {
    "pissa": "PiSSA",
    "corda": "CorDA",
    "olora": "OLoRA",
    "loftq": "LoftQ",
    "lora_ga": "LoRA-GA",
}
# `unknown` key → the reason why its update is not one s·B·A per module of the declared base.
_VARIANTS = {
    "alora_invocation_tokens": "aLoRA: the update acts only after its invocation tokens",
    "alora_invocation_string": "aLoRA: the update acts only after its invocation string",
    "arrow_config": "Arrow: the update depends on the input (routing)",
    "kasa_config": "KaSA: a diagonal stands between B and A, and the base was truncated",
    "layer_replication": "layer_replication: its layers are not those of the base",
    "megatron_config": "megatron_config: the factors belong to Megatron's sharded layers",
    "trainable_token_indices": "trainable_token_indices: single token embeddings were trained",
    "use_bdlora": "BD-LoRA: a factor is block-diagonal",
    "use_qalora": "QALoRA: A reads pooled inputs",
}
# PEFT switches these on for any object, even an empty one; the others only if they are truthy.
_ON_WHEN_PRESENT = ("arrow_config", "kasa_config", "use_bdlora")


@dataclass(frozen=True, eq=False)
class LoraConfigFacts:
    """The facts in adapter_config.json. Compared by identity: `parse_config` gives one object for the same bytes.

    `base` is the base model as declared ("" for none), `revision` the branch, tag or commit of it ("" for the main
    branch); `target_modules` is a tuple of names or, as a str, the
    regular expression they were given as; `rank` and `alpha` are None where the file gives none (`r` and `alpha` of
    single modules: `rank_pattern`, `alpha_pattern`); `init` is init_lora_weights as text ("true" by default);
    `layers_to_transform` is False for all layers. `unknown` holds every other key as parsed JSON; of another type than
    LORA, all keys but the base, its revision and the task are there.
    """

    peft_type: str
    base: str = ""
    revision: str = ""
    rank: int | None = None
    alpha: float | None = None
    rslora: bool = False
    dora: bool = False
    bias: str = "none"
    lora_bias: bool = False
    target_modules: tuple[str, ...] | str = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    fan_in_fan_out: bool = False
    modules_to_save: tuple[str, ...] = ()
    layers_to_transform: bool | tuple[int, ...] = False
    exclude_modules: tuple[str, ...] | str = ()
    task_type: str = ""
    target_parameters: tuple[str, ...] = ()
    init: str = "true"
    unknown: Mapping[str, Any] = field(default_factory=dict)

    @property
    def pinned_base(self) -> str:
        """The base as a user names it: `base@revision`, or `base` alone for the main branch and for a path."""
        return at_revision(self.base, self.revision)

    @cached_property
    def _alphas(self) -> "_Patterns":
        return _Patterns("alpha_pattern", self.alpha_pattern)

    @cached_property
    def _ranks(self) -> "_Patterns":
        return _Patterns("rank_pattern", self.rank_pattern)

    @cached_property
    def targets(self) -> Targets:
        """The modules and parameters that the configuration targets."""
        return Targets(self)

    @property
    def trained_class(self) -> str:
        """The class of the model that the adapter was trained on, "" if PEFT did not record it."""
        mapping = self.unknown.get("auto_mapping")
        named = mapping.get("base_model_class") if isinstance(mapping, dict) else None
        return named if isinstance(named, str) else ""

    def for_another_class(self, architecture: str) -> bool:
        """Whether the adapter declares training on another class: a named one, or the one without a head."""
        return self.task_type == "FEATURE_EXTRACTION" or self.trained_class not in ("", architecture)

    @property
    def ties_weights(self) -> bool:
        """Whether an update of the embeddings is one of the head too, in a base where the two share one weight."""
        return self.unknown.get("ensure_weight_tying") is True

    def rank_of(self, module: str) -> int:
        """The rank of `module`, by the first matching key of `rank_pattern`, else r.

        Raises ConfigError where a key cannot be evaluated.
        """
        found = self._ranks.find(module)
        return (self.rank or DEFAULT_RANK) if found is None else int(found)

    def scale(self, module: str, rank: int) -> float:
        """The factor s of s·B·A in `module` (its name in the base model), whose A has `rank` rows.

        alpha/rank, or alpha/sqrt(rank) for rslora, with alpha from the first matching key of `alpha_pattern` as
        `peft.utils.other.get_pattern_key` finds it. Raises ConfigError where alpha is not known or a key cannot be
        evaluated.
        """
        found = self._alphas.find(module)
        alpha = self.alpha if found is None else found
        if alpha is None:
            raise ConfigError("lora_alpha is missing: the scale of the update is not known")
        if rank <= 0:
            raise ConfigError(f"rank {rank} in {module}")
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def refusals(self) -> tuple[str, ...]:
        """The reasons why the update is not s·B·A per module of the declared base; empty if it is.

        `modules_to_save` is no reason by itself: it may name modules the base does not have. Whether full weights
        were saved is seen in the header (`header.tensor_refusals`).
        """
        if self.peft_type != "LORA":
            return (f"peft_type is {shortened(self.peft_type)}, not LORA",)
        reasons = []
        if self.dora:
            reasons.append("DoRA: weights are rescaled by a trained magnitude (use_dora)")
        if self.lora_bias:
            reasons.append("lora_bias: B has a bias of its own")
        if self.bias != "none":
            reasons.append(f"bias={shortened(self.bias)}: biases of the base were trained")
        reasons.extend(why for key, why in _VARIANTS.items() if self._switched_on(key))
        reasons.extend(self._init_refusals())
        reasons.extend(patterns.unsupported for patterns in (self._alphas, self._ranks) if patterns.unsupported)
        if self.alpha is None and not self.alpha_pattern:
            reasons.append("lora_alpha is missing: the scale of the update is not known")
        return tuple(reasons)

    def _switched_on(self, key: str) -> bool:
        value = self.unknown.get(key)
        if key in _ON_WHEN_PRESENT:
            return value is not None and value is not False
        return bool(value)

    def _init_refusals(self) -> list[str]:
        init = self.init.lower()
        for prefix, name in _BASE_CHANGING_INITS.items():
            if init.startswith(prefix):
                return [f"{name}: B·A is relative to a base that {name} changed; save it converted to plain LoRA"]
        if init not in _PLAIN_INITS:
            return [f"init_lora_weights is {shortened(self.init)}: not known to leave the base as it is"]
        return []


class _Patterns:
    """Values by PEFT's rule: the first key with re.match(rf"(.*\\.)?({key})$", module).

    A key that is a name may start with ^, end with $, and hold \\. for a dot; its bare dots match any character, as in
    PEFT. Such keys are tables by their shape (anchor, length, places of bare dots), so that a lookup costs one probe
    per shape however many keys a stranger wrote. Every other key is a regular expression, of which a few are evaluated
    on a budget of time. `unsupported` says why a key cannot be evaluated, "" where all can.
    """

    def __init__(self, what: str, patterns: Mapping[str, float]) -> None:
        self.unsupported = ""
        self._what = what
        self._shapes: dict[tuple[bool, int, tuple[int, ...]], dict[str, tuple[int, float]]] = {}
        self._tests: list[tuple[int, Test, float]] = []
        self._left = SECONDS
        for order, (key, value) in enumerate(patterns.items()):
            plain = _plain_key(key)
            try:
                if plain is None:
                    self._tests.append((order, fullmatch(rf"(.*\.)?({key})"), value))
                else:
                    anchored, literal, dots = plain
                    self._shapes.setdefault((anchored, len(literal), dots), {}).setdefault(literal, (order, value))
            except Undecided:
                self._refuse(key)
            if len(self._shapes) > MAX_PATTERN_SHAPES or len(self._tests) > MAX_REGEX_KEYS:
                self._refuse(key)
            if self.unsupported:
                return

    def _refuse(self, key: str) -> None:
        self.unsupported = f"{self._what} has the key {shortened(key)}, a regular expression that is not evaluated here"

    def find(self, module: str) -> float | None:
        if self.unsupported:
            raise ConfigError(self.unsupported)
        found = [(order, value) for order, value in (self._named(module), self._matching(module)) if order >= 0]
        return min(found)[1] if found else None

    def _named(self, module: str) -> tuple[int, float]:
        best = (-1, 0.0)
        for (anchored, length, dots), table in self._shapes.items():
            cut = len(module) - length
            if cut < 0 or (cut > 0 and (anchored or module[cut - 1] != ".")):
                continue
            tail = list(module[cut:])
            for place in dots:
                tail[place] = "."
            found = table.get("".join(tail))
            if found is not None and (best[0] < 0 or found[0] < best[0]):
                best = found
        return best

    def _matching(self, module: str) -> tuple[int, float]:
        begin = time.monotonic()
        found = next(((order, value) for order, test, value in self._tests if test(module)), (-1, 0.0))
        self._left -= time.monotonic() - begin
        if self._left < 0:
            raise ConfigError(f"{self._what}: its regular expressions take too long")
        return found


def _plain_key(key: str) -> tuple[bool, str, tuple[int, ...]] | None:
    """(anchored, literal, places of any-character dots) of a key that is a module name, None for another regex."""
    anchored = key.startswith("^")
    body = key.removeprefix("^").removesuffix("$")
    literal: list[str] = []
    dots = []
    escaped = False
    for char in body:
        if escaped:
            if char != ".":
                return None
            literal.append(".")
            escaped = False
        elif char == "\\":
            escaped = True
        elif char == ".":
            dots.append(len(literal))
            literal.append(".")
        elif char.isalnum() or char in "_-":
            literal.append(char)
        else:
            return None
    if escaped or not literal:
        return None
    return anchored, "".join(literal), tuple(dots)


def shortened(value: object) -> str:
    """`value` as text of at most 120 characters, for a sentence. Escaping is the screen's work."""
    shown = str(value)
    return shown if len(shown) <= 120 else shown[:120] + "…"


@lru_cache(maxsize=32)
def parse_config(data: bytes) -> LoraConfigFacts:
    """The facts in the bytes of one adapter_config.json, of any PEFT type and version.

    Raises ConfigError for what is not a JSON object, names one key twice, holds NaN or infinity, nests deeper than
    `MAX_DEPTH`, is longer than `MAX_CONFIG_BYTES`, is a Git LFS pointer, or gives a known key a value of another type.
    """
    if data.lstrip()[: len(LFS_POINTER)] == LFS_POINTER:
        raise ConfigError("config is a Git LFS pointer", hint="the file was never fetched: run `git lfs pull` there")
    if len(data) > MAX_CONFIG_BYTES:
        raise ConfigError(f"adapter_config.json has {len(data):,} bytes; more than {MAX_CONFIG_BYTES:,} is no config")
    raw = _parse_json(data)

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


def _parse_json(data: bytes) -> dict[str, Any]:
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
        value = self._raw.pop(key, None)
        if value is None:
            return default
        try:
            return read(value)
        except _Wrong as wrong:
            raise ConfigError(f"{key} in adapter_config.json must be {wrong}, not {shortened(value)}") from wrong

    def rest(self) -> dict[str, Any]:
        return self._raw


class _Wrong(Exception):
    """The expected form of a value."""


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
