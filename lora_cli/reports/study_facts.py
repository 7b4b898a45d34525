"""What the report of a study shows, as records: from them a page, Markdown and JSON are made."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import stdev
from typing import Literal

from lora_cli.records import LEVEL
from lora_cli.scores import Difference, least_measurable, pairs_needed

Control = Literal["base", "target", "noise", "sequential", "alone", "next"]
CONTROLS: tuple[Control, ...] = ("base", "target", "noise")
Role = Literal["base", "target", "noise", "recycled", "sequential", "alone", "merge"]
Outcome = Literal["better", "worse", "open", "few", "missing"]
_MANY = 1_000_000


def needed_in_words(needed: int | None) -> str:
    """A number of examples for people, "" for None."""
    return "" if needed is None else f"{needed:,}" if needed < _MANY else f"over {_MANY:,}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """How much better a system is than one control on the same test examples.

    `pairs` holds the gain on each example, positive where the system is better whatever the metric's direction. `found`
    is their mean with its interval and p; `p_holm` is p corrected for all comparisons with this control.
    """

    pairs: tuple[float, ...]
    found: Difference
    p_holm: float

    @property
    def shown(self) -> bool:
        """Whether the difference is beyond chance: the interval excludes zero and the corrected p is below 5 %."""
        return self.found.measurable and self.p_holm < LEVEL

    @property
    def wins(self) -> int:
        """The examples on which the system is better."""
        return sum(one > 0 for one in self.pairs)

    @property
    def losses(self) -> int:
        """The examples on which it is worse."""
        return sum(one < 0 for one in self.pairs)

    @property
    def spread(self) -> float:
        """The standard deviation of the paired differences, 0 for a single one."""
        return stdev(self.pairs) if len(self.pairs) > 1 else 0.0

    @property
    def needed(self) -> int | None:
        """The test examples at which 80 % of studies show a difference as large as this one."""
        return pairs_needed(self.found.delta, self.spread)

    @property
    def least(self) -> float:
        """The difference that 80 % of studies with as many test examples as this one show."""
        return least_measurable(self.spread, len(self.pairs))


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A system on a pool ("" for none): its score in the mean over seeds, and its gains by control.

    `by_seed` holds the score of each cell; `drawn` is whether they depend on a seed at all. `seconds` and `tokens` are
    what one cell and its shared work took in the mean, None where that is not noted.
    """

    system: str
    pool: str
    role: Role
    value: float
    low: float
    high: float
    n: int
    by_seed: tuple[float, ...]
    drawn: bool = False
    gains: Mapping[Control, Gain] = field(default_factory=dict)
    seconds: float | None = None
    tokens: float | None = None

    @property
    def name(self) -> str:
        """The system and its pool, for a sentence."""
        return f"{self.system} ({self.pool})" if self.pool else self.system

    @property
    def is_asked(self) -> bool:
        """Whether a verdict asks about it: whatever is no control."""
        return self.role in ("recycled", "merge")

    @property
    def is_one_draw(self) -> bool:
        """Whether another seed would give another score, and only one was tried."""
        return self.drawn and len(self.by_seed) == 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The answer to one question of a study: is recycling better than `control`?

    `row` names the system that is asked about, `found` says what was found of it, and `follows` what follows.
    """

    control: Control
    question: str
    outcome: Outcome
    row: str
    found: str
    follows: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A study in plain words: one sentence, and the answers behind it."""

    summary: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One test example on which two answers have different values. `base` and `system` are None without outputs."""

    id: str
    prompt: str
    expected: str
    base: str | None
    system: str | None
    base_value: float
    system_value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What a system changes in the base's answers: counts over all test examples, and as many of either kind shown."""

    name: str
    cell: str
    gained: int
    lost: int
    same: int
    gains: tuple[Change, ...]
    losses: tuple[Change, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Learnt:
    """The coefficients of a fit's cell: `values[i][j]` of adapter i in module j, a mean over ranks where each has one.

    An adapter that lacks a module has None there.
    """

    cell: str
    adapters: tuple[str, ...]
    modules: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    by_rank: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Used:
    """An adapter at its commit: the licence it states, the SHA-256 of its weights, and the cells made of it."""

    pinned: str
    licence: str
    sha256: str
    cells: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What the reports of studies and of sequences share. `about` holds what all cells have in common, by name.

    `failed` are cells with their errors, `missing` those that nobody tried.
    """

    metric: str
    meaning: str
    better: Literal["higher", "lower"]
    n: int
    about: Mapping[str, str]
    planned: int
    rows: tuple[Row, ...]
    verdict: Verdict
    failed: Mapping[str, str]
    missing: tuple[str, ...]

    @property
    def done(self) -> int:
        """The number of cells that have a result."""
        return self.planned - len(self.failed) - len(self.missing)


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyReport(Report):
    """A study that compares systems over pools, as its report shows it."""

    changes: Changes | None
    learnt: tuple[Learnt, ...]
    adapters: tuple[Used, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ruled:
    """What came of one rule of a sequence, by the seeds of which all cells are done.

    `a[i][j]` is the score on task j after learning task i, (T, T), in the mean over the seeds. `measures` holds each
    measure by seed. `method` and `weights` say how the rule joins the running LoRA and the new one.
    """

    rule: str
    method: str
    weights: str
    seeds: tuple[int, ...]
    a: tuple[tuple[float, ...], ...]
    measures: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Taught:
    """A task of a sequence: the test examples, the SHA-256 of its data, and the base's score."""

    name: str
    n: int
    train: str
    test: str
    base: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A LoRA trained on one task alone: its cell, its task, and the SHA-256 of its weights."""

    cell: str
    task: str
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceReport(Report):
    """A sequence as its report shows it. Each row is a rule after the last task, or a control.

    `order` names the rules from the best to the worst; in `rows`, each has its gain over the one behind it as "next".
    """

    tasks: tuple[Taught, ...]
    rules: tuple[Ruled, ...]
    order: tuple[str, ...]
    loras: tuple[Trained, ...]
