"""The facts in an adapter's configuration: scales, ranks, and reasons why an update is not s·B·A.

Rules of scale and of variants: PEFT 0.21 (`peft/tuners/lora/layer.py`, `variants.py`,
`peft/utils/other.py:get_pattern_key`).
"""

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from lora_cli.errors import ConfigError
from lora_cli.formats.base_names import at_revision
from lora_cli.formats.targets import MOST_NAMES, SECONDS, Targets, Test, Undecided, fullmatch
from lora_cli.text import shortened

MAX_PATTERN_SHAPES = 512
MAX_REGEX_KEYS = 64
DEFAULT_RANK = 8
"""The rank of a configuration that gives none, as in PEFT."""
TASKS_WITH_A_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
"""Tasks for which PEFT always loads a head, and fails if there is none."""

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

    @cached_property
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

    def ranks_of(self, modules: Iterable[str]) -> list[int]:
        """`rank_of` each module."""
        return [self.rank_of(module) for module in modules]

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

    def scales(self, modules: Iterable[tuple[str, int]]) -> list[float]:
        """`scale` of each module and its rank."""
        return [self.scale(module, rank) for module, rank in modules]

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
        self._matching = lru_cache(MOST_NAMES)(self._tested)
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
        """The value of the first key that matches `module`, None if no key does.

        Raises ConfigError where a key cannot be evaluated.
        """
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

    def _tested(self, module: str) -> tuple[int, float]:
        begin = time.thread_time()
        found = next(((order, value) for order, test, value in self._tests if test(module)), (-1, 0.0))
        self._left -= time.thread_time() - begin
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
