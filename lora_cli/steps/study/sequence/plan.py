"""The plan of a sequence: its tasks, and a cell for each rule, seed and task, named by the hash of what decides it."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from lora_cli.errors import UsageError
from lora_cli.formats.run_record import is_plain
from lora_cli.merge_options import METHODS, MergeOptions
from lora_cli.recipes import EvalOptions, TargetRecipe, TrainOptions
from lora_cli.steps.study.plan import MOST_CELLS, Base, demand_same
from lora_cli.study_options import names_in
from lora_cli.text import counted, nearest, shortened

SCHEMA = "lora.sequence/1"
BASE, ALONE, SEQUENTIAL = "base", "alone", "sequential"


class Rule(NamedTuple):
    """How the LoRA of a new task joins the running one: a merge method, and whether every task counts the same.

    If it does, the running LoRA has the weight (t-1)/t at task t, and the new one 1/t. Else both have 1. `clusters` are
    those of LEGO, 0 for as many as one LoRA has ranks.
    """

    method: str
    mean: bool
    clusters: int = 0


MERGES: Mapping[str, Rule] = {
    "average": Rule("linear", mean=True),
    "ties": Rule("ties", mean=True),
    "lego": Rule("lego", mean=True),
    "orthogonal": Rule("orthogonal", mean=False),
}
RULES = (*MERGES, SEQUENTIAL)
"""Every rule; `sequential` merges nothing: one LoRA is trained on. `lego-K` is LEGO with K clusters."""
_LEGO = re.compile(r"lego-([1-9]\d{0,4})", re.ASCII)


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """One task: its name, and the SHA-256 of its training and of its test data, which lie beside the plan."""

    name: str
    train: str
    test: str


class Cell(NamedTuple):
    """One LoRA and its scores on every task: by a rule and a seed, after so many tasks.

    The rule `base` is the bare base model, and `alone` a LoRA trained on one task, the one at `step`. `needs` are the
    cells whose LoRAs it is made of: the running one, then the new one.
    """

    name: str
    rule: str
    seed: int
    step: int
    needs: tuple[str, ...] = ()


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """A planned sequence, as sequence.json holds it.

    `shared` is what decides the results of all cells beside the options: versions, and the base at its version. Results
    depend on nothing in `base` but through `shared`.
    """

    schema: str = SCHEMA
    tasks: tuple[Stage, ...]
    rules: tuple[str, ...]
    seed: int
    seeds: int
    rank: str
    lora: Mapping[str, Any]
    recipe: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    shared: Mapping[str, Any]
    base: Base

    def __post_init__(self) -> None:
        """ValueError for an unknown rule, a task name that is no file name, or too many cells."""
        for rule in self.rules:
            if not _is_rule(rule):
                raise ValueError(f"{shortened(rule)} is no rule")
        for stage in self.tasks:
            if not is_plain(stage.name):
                raise ValueError(f"{shortened(stage.name)} is no name of a task")
        cells = 1 + self.seeds * len(self.tasks) * (1 + len(self.rules))
        if not 1 < cells <= MOST_CELLS:
            raise ValueError(f"{counted(cells, 'cell')}, and a sequence has 2 to {MOST_CELLS:,}")

    @property
    def every_seed(self) -> range:
        """The seeds."""
        return range(self.seed, self.seed + self.seeds)

    @property
    def options(self) -> EvalOptions:
        """How the tasks are scored."""
        options: EvalOptions = EvalOptions.of_settings(self.evaluation)
        return options

    @property
    def train_options(self) -> TrainOptions:
        """The LoRA that is trained on each task."""
        return TrainOptions.of_settings(self.lora)

    def trained_by(self, seed: int) -> TargetRecipe:
        """How it is trained."""
        return TargetRecipe.of_settings({**self.recipe, "seed": seed})

    def merge(self, rule: str, seed: int) -> MergeOptions:
        """The options with which a rule merges."""
        method, _, clusters = rule_of(rule)
        given = {"clusters": clusters or self.train_options.rank} if method == "lego" else {}
        drawn = {"seed": seed} if "seed" in METHODS.get(method).knobs else {}
        return MergeOptions.of(method=method, knobs=given | drawn, rank=self.rank)

    @property
    def digest(self) -> str:
        """8 hex digits of a hash of all that decides the results, but for rules and seeds."""
        return _hash([self.shared, self.evaluation, self.lora, self.recipe, self.rank, msgspec.to_builtins(self.tasks)])

    def cells(self) -> list[Cell]:
        """Every cell, each behind those that it needs."""
        found = [self._cell(BASE, 0, 0)]
        for seed in self.every_seed:
            found += self.row(ALONE, seed)
            for rule in self.rules:
                found += self.row(rule, seed)[1:]
        return found

    def row(self, rule: str, seed: int) -> list[Cell]:
        """The cells of one rule and seed, task by task. After the first task, every rule has the LoRA of this task."""
        alone = [self._cell(ALONE, seed, step) for step in range(1, len(self.tasks) + 1)]
        if rule == ALONE:
            return alone
        cells = alone[:1]
        for new in alone[1:]:
            needs = (cells[-1].name,) if rule == SEQUENTIAL else (cells[-1].name, new.name)
            cells.append(self._cell(rule, seed, new.step, needs))
        return cells

    def _cell(self, rule: str, seed: int, step: int, needs: tuple[str, ...] = ()) -> Cell:
        tests = [[stage.name, stage.test] for stage in self.tasks]
        decisive = [self.shared, self.evaluation, tests, rule, needs, *self._made(rule, seed, step)]
        digest = _hash(decisive)
        name = f"{rule}-{digest}" if rule == BASE else f"{rule}-s{seed}-{step}-{digest}"
        return Cell(name, rule, seed, step, needs)

    def _made(self, rule: str, seed: int, step: int) -> list[Any]:
        """What decides the LoRA of a cell, beside the cells that it needs."""
        if rule == BASE:
            return []
        if rule not in (ALONE, SEQUENTIAL):
            return [self.merge(rule, seed).settings, weights_of(rule, step)]
        stage = self.tasks[step - 1]
        return [self.lora, self.recipe, seed, stage.name, stage.train]

    def extended(self, other: "Plan") -> "Plan":
        """This plan with the rules and the seeds of another one of the same sequence.

        Raises:
            OutputError: the other differs in anything else.
        """
        for name, ours, theirs in _fields(self, other):
            if name not in ("rules", "seeds", "base"):
                demand_same("sequence", name, ours, theirs)
        rules = tuple(dict.fromkeys([*self.rules, *other.rules]))
        return msgspec.structs.replace(self, rules=rules, seeds=max(self.seeds, other.seeds), base=other.base)


def rows_of(cells: Sequence[Cell]) -> list[list[Cell]]:
    """The cells of each seed's LoRAs alone and of each rule by each seed, seed by seed; the base's with the first."""
    rows: dict[tuple[int, str], list[Cell]] = {}
    for cell in cells:
        if cell.rule != BASE:
            rows.setdefault((cell.seed, cell.rule), []).append(cell)
    found = [*rows.values()]
    found[0] = [*(cell for cell in cells if cell.rule == BASE), *found[0]]
    return found


def shard_of(cells: Sequence[Cell], part: tuple[int, int]) -> list[Cell]:
    """The cells of shard i of n, (i, n): a block of rows, so that a seed's LoRAs are trained in few shards.

    What these cells need is there too, so that shards overlap and no shard waits for another.
    """
    rows, (place, many) = rows_of(cells), part
    ours = rows[place * len(rows) // many : (place + 1) * len(rows) // many]
    wanted = {cell.name for row in ours for cell in row}
    for cell in reversed(cells):  # each stands behind those that it needs
        if cell.name in wanted:
            wanted.update(cell.needs)
    return [cell for cell in cells if cell.name in wanted]


def plan_text(plan: Plan) -> bytes:
    """The bytes of sequence.json."""
    return msgspec.json.format(msgspec.json.encode(plan), indent=2) + b"\n"


def weights_of(rule: str, step: int) -> tuple[float, float]:
    """The weights of the running and of the new LoRA at task `step`, the first being 1."""
    return ((step - 1) / step, 1 / step) if rule_of(rule).mean else (1.0, 1.0)


def rule_of(name: str) -> Rule:
    """The rule of this name. KeyError for an unknown one."""
    found = _LEGO.fullmatch(name)
    return MERGES[name] if found is None else Rule("lego", mean=True, clusters=int(found[1]))


def _is_rule(name: str) -> bool:
    return name in RULES or _LEGO.fullmatch(name) is not None


def named_rules(text: str, rank: int) -> tuple[str, ...]:
    """The rules in a text with commas, each once. UsageError for an unknown one, or for none.

    Args:
        rank: of one LoRA; two of them have at most twice as many clusters.
    """
    names = tuple(names_in(text))
    for name in names:
        if name.startswith("lego-") and not (_is_rule(name) and rule_of(name).clusters <= 2 * rank):
            raise UsageError(
                f"{name}: the K of lego-K is a number of clusters, from 1 to {2 * rank} here",
                hint=f"two LoRAs of --target-rank {rank} have {2 * rank} directions, and a cluster has one at least",
            )
        if not _is_rule(name):
            known = f"there are {', '.join(RULES)}, and lego-K for K clusters"
            raise UsageError(f"unknown rule {name!r}", hint=nearest(name, RULES, known))
    if not names:
        raise UsageError("a sequence needs a rule", hint=f"there are {', '.join(RULES)}")
    return names


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def _fields(one: Plan, other: Plan) -> Iterator[tuple[str, Any, Any]]:
    """Each field by its name with the values of both, before all others the names of the tasks."""
    ours, theirs = (", ".join(stage.name for stage in plan.tasks) for plan in (one, other))
    yield "tasks", ours, theirs
    here, there = (msgspec.json.decode(msgspec.json.encode(plan)) for plan in (one, other))
    for name in here:
        yield name, here[name], there[name]
