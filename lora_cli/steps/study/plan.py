"""The plan of a study: its cells and what they need, each under a name that holds the hash of all that decides it."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from lora_cli.errors import DataError, LoraError, OutputError
from lora_cli.licences import Policy
from lora_cli.precision import Loading
from lora_cli.steps.study.ways import Rule, Way, demand_name
from lora_cli.text import counted, shortened

SCHEMA = "lora.study/1"
MOST_CELLS = 1_000_000
"""A study has no more: each of them is a folder."""
_OF_BASE = ("data", "candidates")
"""What the base's own cell does not depend on."""
_OF_TARGET = ("candidates",)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
BEST = "relevant"
"""The pool whose best adapter the system `single` is."""


class Cell(NamedTuple):
    """One system made once and scored: of a pool ("" for none), by a seed (None where it draws nothing)."""

    name: str
    system: str
    pool: str
    seed: int | None
    needs: tuple[str, ...]


class Need(NamedTuple):
    """Work that cells share: the LoRA trained on the data, or the selection of a pool."""

    name: str
    kind: Literal["target", "selection"]
    pool: str
    seed: int | None
    needs: tuple[str, ...]


class Grid(msgspec.Struct, frozen=True, kw_only=True):
    """Systems × pools × seeds that were asked for together."""

    systems: tuple[str, ...]
    pools: tuple[str, ...]
    seed: int
    seeds: Annotated[int, msgspec.Meta(ge=1)]

    @property
    def most(self) -> int:
        """At most so many cells."""
        return len(self.systems) * max(1, len(self.pools)) * self.seeds


class Base(msgspec.Struct, frozen=True, kw_only=True):
    """The base model of a study: its place for this study's workers, its other names, and the form of prompts."""

    place: str
    aliases: tuple[str, ...]
    device: str
    dtype: Loading
    prompting: Mapping[str, Any]
    license_policy: Policy


class Study(msgspec.Struct, frozen=True, kw_only=True):
    """A planned study, as study.json holds it.

    `shared` is what all cells have in common and what decides their results: versions, hashes of the data, of the base
    and of the candidates, and how answers are scored. Results depend on nothing in `base` but through `shared`.
    """

    schema: str = SCHEMA
    shared: Mapping[str, Any]
    base: Base
    evaluation: Mapping[str, Any]
    systems: Mapping[str, Way]
    pools: Mapping[str, Rule]
    grids: tuple[Grid, ...]

    def cells(self, grid: Grid | None = None) -> list[Cell]:
        """The cells of all grids, or of one, each once, in the plan's order."""
        names = _Names(self)
        grids = self.grids if grid is None else (grid,)
        return [*{cell.name: cell for one in grids for cell in names.cells(one)}.values()]

    def needs(self, cells: Iterable[Cell]) -> dict[str, Need]:
        """What these cells need, by name, each behind what it needs itself."""
        names, found = _Names(self), dict[str, Need]()
        for cell in cells:
            for need in names.of_cell(cell):
                if need.name not in found:
                    found.update((one.name, one) for one in names.before(need))
                    found[need.name] = need
        return found

    def extended(self, other: "Study") -> "Study":
        """This study with the systems, pools and grids of another one of the same data.

        Raises:
            OutputError: the other differs in what all cells share, or in a system or a pool of the same name.
        """
        for what, ours, theirs in (
            ("", self.shared, other.shared),
            ("system ", _plain(self.systems), _plain(other.systems)),
            ("pool ", _plain(self.pools), _plain(other.pools)),
        ):
            both = ours.keys() & theirs.keys() if what else ours.keys() | theirs.keys()
            for name in sorted(both):
                demand_same("study", f"{what}{name}", ours.get(name), theirs.get(name))
        return msgspec.structs.replace(
            self,
            systems={**self.systems, **other.systems},
            pools={**self.pools, **other.pools},
            grids=tuple(dict.fromkeys([*self.grids, *other.grids])),
        )


class _Names:
    """The names of a study's cells and needs: a hash per system and pool, and not per cell, for 100,000 cells."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self._shared = {left_out: _hash(_without(study.shared, left_out)) for left_out in (_OF_BASE, _OF_TARGET, ())}
        self._ways = {name: _hash(_plain(way)) for name, way in study.systems.items()}
        self._rules = {name: _hash(_plain(rule)) for name, rule in study.pools.items()}
        self._chosen = {name: _hash(_plain(rule.chosen)) for name, rule in study.pools.items()}
        self._made: dict[tuple[str, int | None], Need] = {}
        self._drawn = {name: rule.drawn for name, rule in study.pools.items()}
        self._draws = {name: way.draws for name, way in study.systems.items()}

    def cells(self, grid: Grid) -> Iterator[Cell]:
        seeds = range(grid.seed, grid.seed + grid.seeds)
        for system in grid.systems:
            way = self._study.systems[system]
            for pool in grid.pools if way.pooled else ("",):
                if pool and self._study.pools[pool].noise and way.kind != "fit":
                    continue
                drawn = self._draws[system] or (pool and self._drawn[pool])
                for seed in seeds if drawn else (None,):
                    yield self._cell(system, way, pool, seed)

    def of_cell(self, cell: Cell) -> list[Need]:
        """What a cell needs at once."""
        way = self._study.systems[cell.system]
        return self._of(way, cell.pool, cell.seed)

    def before(self, need: Need) -> list[Need]:
        """What a need needs itself."""
        return [self._target(need.seed)] if need.needs else []

    def _cell(self, system: str, way: Way, pool: str, seed: int | None) -> Cell:
        left_out = _OF_BASE if way.kind == "base" else _OF_TARGET if way.kind == "target" else ()
        needs = tuple(need.name for need in self._of(way, pool, seed))
        digest = _joint(self._shared[left_out], self._ways[system], self._rules.get(pool, ""), str(seed), *needs)
        return Cell(_named(system, pool, seed, digest), system, pool, seed, needs)

    def _of(self, way: Way, pool: str, seed: int | None) -> list[Need]:
        found = [self._target(seed)] if way.target or way.kind == "target" else []
        if way.pooled or way.kind == "single":
            found.append(self._selection(pool or BEST, seed))
        return found

    def _target(self, seed: int | None) -> Need:
        key = "", seed
        if key not in self._made:
            self._made[key] = self._new_target(seed)
        return self._made[key]

    def _selection(self, pool: str, seed: int | None) -> Need:
        key = pool, seed if self._drawn[pool] else None
        if key not in self._made:
            self._made[key] = self._new_selection(*key)
        return self._made[key]

    def _new_target(self, seed: int | None) -> Need:
        digest = _hash([self._shared[_OF_TARGET], self._ways["target"], seed])
        return Need(_named("target", "", seed, digest), "target", "", seed, ())

    def _new_selection(self, pool: str, drawn: int | None) -> Need:
        rule = self._study.pools[pool]
        needs = (self._target(drawn).name,) if rule.kind == "weights" else ()
        digest = _hash([self._shared[()], self._chosen[pool], drawn, needs])
        return Need(_named("selection", "", drawn, digest), "selection", pool, drawn, needs)


def completed(systems: Mapping[str, Way], pools: Mapping[str, Rule]) -> set[str]:
    """What a study has to define besides what is compared: "target" and the pool of `single`, where they are needed."""
    wanted = {"target"} if any(way.target for way in systems.values()) else set()
    wanted |= {"target"} if any(rule.kind == "weights" for rule in pools.values()) else set()
    return wanted | ({BEST} if any(way.kind == "single" for way in systems.values()) else set())


def shard_of(cells: Sequence[Cell], shard: tuple[int, int]) -> list[Cell]:
    """The cells of shard i of n, (i, n): every n-th one from place i on."""
    return [*cells[shard[0] :: shard[1]]]


def read_study(data: bytes, where: str) -> Study:
    """The study in the bytes of a study.json. DataError for anything else, or a plan that `lora study` cannot make."""
    try:
        study = msgspec.json.decode(data, type=Study)
        if study.schema != SCHEMA:
            raise DataError(f"{where}: a study of another version of lora ({shortened(study.schema)})")
        _demand_sound(study)
    except (msgspec.MsgspecError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{where}: not a study of lora ({shortened(str(error))})") from None
    except LoraError as error:
        raise error if isinstance(error, DataError) else DataError(f"{where}: {error.message}") from None
    return study


def demand_countable(grids: Sequence[Grid]) -> None:
    """ValueError for more cells than a study has."""
    if (most := sum(grid.most for grid in grids)) > MOST_CELLS:
        raise ValueError(f"{counted(most, 'cell')}, and a study has at most {MOST_CELLS:,}")


def _demand_sound(study: Study) -> None:
    """An error for names that are no names of folders or stand for nothing, for options that nothing takes, and for
    too many cells.
    """
    for name in (*study.systems, *study.pools):
        demand_name(name, "system or pool")
    used = {*completed(study.systems, study.pools)}
    used.update(name for grid in study.grids for name in (*grid.systems, *grid.pools))
    if lost := sorted(used - {*study.systems, *study.pools}):
        raise ValueError(f"{shortened(lost[0])} is not defined")
    demand_countable(study.grids)
    _Names(study)  # reads the options of every system and pool


def study_text(study: Study) -> bytes:
    """The bytes of study.json."""
    return msgspec.json.format(msgspec.json.encode(study, order="sorted"), indent=2) + b"\n"


def _named(what: str, pool: str, seed: int | None, digest: str) -> str:
    return "-".join([what, *([pool] if pool else []), *([] if seed is None else [f"s{seed}"]), digest[:8]])


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _joint(*parts: str) -> str:
    """The hash of texts without line breaks; quicker than `_hash`, for 100,000 cells."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _plain(value: Any) -> Any:
    return msgspec.to_builtins(value)


def _without(shared: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in shared.items() if name not in names}


def demand_same(what: str, name: str, ours: Any, theirs: Any) -> None:
    """OutputError where a folder's plan and another one differ; it names the first place at which they do.

    Args:
        what: what is planned, such as "study".
        name: of these two values in a plan.
    """
    if (found := _difference(ours, theirs)) is not None:
        at, here, there = found
        raise OutputError(
            f"another {what}: {name}{at} is {_in_words(here)} there and {_in_words(there)} here",
            hint="choose another folder with -o",
        )


def _in_words(value: Any) -> str:
    """A value for a sentence; of the SHA-256 of a file so much that it can be told from another."""
    return f"sha256 {value[:12]}…" if isinstance(value, str) and _SHA256.fullmatch(value) else shortened(value)


def _difference(ours: Any, theirs: Any) -> tuple[str, Any, Any] | None:
    """The first place at which two values differ, below them, and what each has there; None if they are equal."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for name in sorted(ours.keys() | theirs.keys()):
            if (found := _difference(ours.get(name), theirs.get(name))) is not None:
                return f".{name}{found[0]}", found[1], found[2]
        return None
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return _difference(dict(enumerate(ours, 1)), dict(enumerate(theirs, 1)))
    return None if ours == theirs else ("", ours, theirs)
