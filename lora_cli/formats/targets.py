"""Which modules PEFT adapts by a configuration, decided without a backtracking regular expression of a stranger's.

Rules: PEFT 0.21, `peft/tuners/tuners_utils.py:check_target_module_exists` and `peft/utils/other.py:get_pattern_key`.
Names are compared as text. Regular expressions go to RE2, whose time is linear in the name; where RE2 lacks an
operator (look-around, back-references), or the time budget is spent, the pattern stays undecided.
"""

import functools
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from lora_cli.formats.skeleton import WEIGHT
from lora_cli.records import ALL_LINEAR

if TYPE_CHECKING:
    from lora_cli.formats.facts import LoraConfigFacts

MAX_REGEX: Final = 2_000
SECONDS: Final = 2.0
"""The budget of processor time for the regular expressions of one configuration."""
MOST_NAMES: Final = 4096
"""The names of modules that are remembered of one configuration."""

_PLAIN = re.compile(r"[\w.-]+")
_FIRST_NUMBER = re.compile(r".*?\.[^.]*\.(\d+)\.")

Test = Callable[[str], bool]


class Undecided(Exception):
    """A pattern is not evaluated here: RE2 cannot express it, or it takes too long."""


def fullmatch(pattern: str) -> Test:
    """Does a name match the whole of `pattern`? Raises Undecided for a pattern that RE2 does not take."""
    found = _compiled(pattern)
    return lambda name: found.fullmatch(name) is not None


@functools.lru_cache(maxsize=256)
def _compiled(pattern: str) -> Any:
    import re2

    options = re2.Options()
    options.log_errors, options.never_capture, options.max_mem = False, True, 1 << 17
    if len(pattern) > MAX_REGEX:
        raise Undecided(pattern)
    try:
        return re2.compile(pattern, options)
    except (re2.error, UnicodeError) as error:
        raise Undecided(pattern) from error


class Targets:
    """The modules and parameters that a configuration targets, by their names in the base model.

    `undecided` is the text of a pattern that is not evaluated, "" for none. With such a pattern every module counts as
    a target: an adapter's file seldom holds modules that its own configuration does not target.
    """

    def __init__(self, config: "LoraConfigFacts") -> None:
        self._left = SECONDS
        self.undecided = ""
        self._parameters = frozenset(config.target_parameters)
        self._only_parameters = config.target_modules == () and bool(config.target_parameters)
        self._excluded = [self._names(config.exclude_modules), *map(self._inside, config.modules_to_save)]
        self._meant = self._targets(config)
        # One configuration can be that of thousands of adapters: their common names count once against the budget.
        self._holds = functools.lru_cache(MOST_NAMES)(self._tested)

    def module(self, name: str) -> bool:
        """Whether PEFT puts an adapter on the module `name`."""
        if self.undecided or self._only_parameters:
            return not self._only_parameters
        return self._holds(name)

    def modules(self, names: Iterable[str]) -> set[str]:
        """Those of `names` that are modules on which PEFT puts an adapter."""
        return {name for name in names if self.module(name)}

    def _tested(self, name: str) -> bool:
        begin = time.thread_time()
        held = self._meant(name) and not any(test(name) for test in self._excluded)
        self._left -= time.thread_time() - begin
        if self._left < 0:
            self.undecided = "too slow"
        return held

    def parameter(self, name: str) -> bool:
        """Whether PEFT puts an adapter on the parameter `name`."""
        return any(ending in self._parameters for ending in endings(name))

    def by_weight(self, names: Iterable[str]) -> set[str]:
        """Those of `names` that are modules which PEFT adapts through their weight, as a parameter."""
        return {name for name in names if self.parameter(name + WEIGHT)}

    def _targets(self, config: "LoraConfigFacts") -> Test:
        targets = config.target_modules
        if not targets or (isinstance(targets, str) and targets.lower() == ALL_LINEAR):
            return lambda name: True
        named, layers = self._names(targets), config.layers_to_transform
        if isinstance(targets, str) or isinstance(layers, bool) or not layers:
            return named
        whole, layer_of = frozenset(targets), self._layer_of(config.unknown.get("layers_pattern"))
        # A full module name is a target in any layer.
        return lambda name: name in whole or (named(name) and layer_of(name) in layers)

    def _layer_of(self, patterns: Any) -> Callable[[str], int | None]:
        """The layer of a name: its first number, or the first after one of `layers_pattern`."""
        patterns = [patterns] if isinstance(patterns, str) else patterns
        if not patterns or not isinstance(patterns, list):
            searches: Sequence[re.Pattern[str]] = [_FIRST_NUMBER]
        elif all(isinstance(one, str) and _PLAIN.fullmatch(one) for one in patterns):
            searches = [re.compile(rf"(?:^|.*?\.){re.escape(one)}\.(\d+)\.") for one in patterns]
        else:
            self.undecided = "layers_pattern"
            searches = []

        def layer(name: str) -> int | None:
            found = next((match for one in searches if (match := one.match(name))), None)
            return None if found is None else int(found[1])

        return layer

    def _names(self, names: Collection[str] | str) -> Test:
        if isinstance(names, str):
            return self._or_undecided(names)
        wanted = frozenset(names)
        return lambda name: any(ending in wanted for ending in endings(name))

    def _inside(self, saved: str) -> Test:
        """PEFT puts no adapter on a module that is saved whole, nor on one below it."""
        if _PLAIN.fullmatch(saved):
            return lambda name: f".{saved}." in f".{name}."
        return self._or_undecided(rf"(^|.*\.)({saved})($|\..*)")

    def _or_undecided(self, pattern: str) -> Test:
        try:
            return fullmatch(pattern) if pattern else lambda name: False
        except Undecided:
            self.undecided = pattern
            return lambda name: False


def endings(name: str) -> Iterator[str]:
    """`name` and all its endings: a.b.c, b.c, c."""
    yield name
    while (dot := name.find(".")) >= 0:
        name = name[dot + 1 :]
        yield name
