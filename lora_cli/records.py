"""The frozen values that the parts of the tool exchange."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal, NamedTuple

Source = Literal["hub", "folder"]
Status = Literal["ok", "quarantined", "unusable", "gated", "gone", "failed"]
BaseMatch = Literal["exact", "alias", "shape", "mismatch", "unknown"]

USABLE: Final = ("ok", "quarantined")
"""The statuses of adapters that can be used where they are named; select takes those of status "ok" alone."""

ALL_LINEAR = "all-linear"
"""PEFT's target for every linear layer."""

LEVEL = 0.05
"""The p value below which a difference is beyond chance."""
PATIENCE = 2.0
Progress = Callable[[str, int, int], None]
"""Called as progress(what, done, total) by every step that can take more than two seconds; total 0 means unknown."""


def silent(what: str, done: int, total: int) -> None:
    """The Progress that shows nothing, the default in a notebook."""


def unheard(text: str) -> None:
    """Announce nothing, the default in a notebook."""


def patient(progress: Progress) -> Progress:
    """`progress` for work that is mostly quick: it is called from the third second on."""
    begin = time.monotonic()

    def report(what: str, done: int, total: int) -> None:
        if time.monotonic() - begin >= PATIENCE:
            progress(what, done, total)

    return report


MOST_DATASETS: Final = 100
"""The most data sets of one card that are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRef:
    """One adapter at one version: enough to find its files and to name it permanently.

    `id` is the user's name for it: `owner/name` or `owner/name:subfolder` on the Hub, `tree/folder` for a folder tree.
    `commit` has 40 hex digits: the repository's commit on the Hub; for a folder the head of a SHA-256 over its
    configuration and weights. `repo` is `owner/name`, or the folder's absolute path.
    """

    id: str
    commit: str
    source: Source
    repo: str
    subfolder: str = ""

    @property
    def pinned(self) -> str:
        """`id@commit`, as it is written into records."""
        return f"{self.id}@{self.commit}"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRow:
    """The catalogue's facts about an adapter, except its card and the rank of each module.

    `base_declared` is the base model in its configuration, at `revision` ("" for the main branch); `base` is the
    resolved base model, `name@revision` if there is a revision. `scale` is alpha/rank (alpha/sqrt(rank) for rslora) if
    it is the same in every module, else None. `norm` is the Frobenius norm of the scaled update over all modules;
    `norm` and `sha256` (of the weights file) are known only after the weights were read; `hub_sha256` is the hash that
    the Hub states, known from a sync. A `status` other than "ok" has a `reason`. `datasets` are those that the card
    names.
    `notes` list repairs and omissions in the file, and its contents besides the update.
    """

    id: str
    commit: str
    source: Source
    repo: str
    subfolder: str = ""
    author: str = ""
    base_declared: str = ""
    revision: str = ""
    base: str = ""
    base_match: BaseMatch = "unknown"
    peft_type: str = ""
    rank: int | None = None
    alpha: float | None = None
    scale: float | None = None
    rslora: bool = False
    target_modules: tuple[str, ...] = ()
    modules: int = 0
    layers: int = 0
    dtype: str = ""
    parameters: int = 0
    bytes: int = 0
    sha256: str = ""
    norm: float | None = None
    licence: str = ""
    downloads: int = 0
    likes: int = 0
    gated: str = ""
    created_at: str = ""
    modified_at: str = ""
    stamp: str = ""
    status: Status = "ok"
    reason: str = ""
    notes: str = ""
    datasets: tuple[str, ...] = ()
    hub_sha256: str = ""

    @property
    def ref(self) -> AdapterRef:
        """The reference to its files."""
        return AdapterRef(id=self.id, commit=self.commit, source=self.source, repo=self.repo, subfolder=self.subfolder)


Prompt = str | tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter(AdapterRow):
    """All facts about one adapter of the catalogue. `ranks` maps each module to its rank, from tensor shapes."""

    ranks: Mapping[str, int] = field(default_factory=dict)
    card: str = ""


class Candidates(NamedTuple):
    """Adapters that selection chooses from, as columns for speed: there may be 100,000 of them.

    `pinned` holds `id@commit` of each; `facts` the columns of the catalogue that were asked for, by name; `bases`
    counts the adapters of each base model, the most frequent first.
    """

    pinned: Sequence[str]
    facts: Mapping[str, Sequence[Any]]
    bases: Mapping[str, int]


class ReportedAdapter(NamedTuple):
    """The facts about an adapter that a report shows. A tuple for speed: there may be 100,000."""

    id: str
    author: str
    base: str
    rank: int | None
    modules: int
    dtype: str
    bytes: int
    licence: str
    downloads: int
    created_at: str
    status: Status
    reason: str


class ImportedScore(NamedTuple):
    """A score that somebody else measured: the adapter as the file names it, and the number of its line."""

    adapter: str
    task: str
    metric: str
    value: float
    n: int
    line: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportCounts:
    """What an import finds in its file, beside the catalogue.

    Scores and adapters are `new`, `changed` or as they were (`same`). Scores of adapters that the catalogue does not
    know (`unknown`) or has at another commit (`elsewhere`) are left out, as are facts about known adapters.
    """

    scores_new: int = 0
    scores_changed: int = 0
    scores_same: int = 0
    adapters_new: int = 0
    adapters_same: int = 0
    adapters_elsewhere: int = 0
    scores_unknown: int = 0
    scores_elsewhere: int = 0
    unknown: int = 0
    elsewhere: int = 0
    unknown_ids: tuple[str, ...] = ()
    elsewhere_ids: tuple[str, ...] = ()
    scored: int = 0
    tasks: int = 0


@dataclass(slots=True, kw_only=True)
class Exported:
    """The rows that an export has written so far."""

    adapters: int = 0
    scores: int = 0

    def count(self, what: str, rows: int) -> None:
        """Add rows of "adapters" or "scores"."""
        setattr(self, what, getattr(self, what) + rows)


class Share(NamedTuple):
    """The adapters that have one thing in common, and how many of them have the status "ok".

    `rest` marks those that have none of the other labels in common.
    """

    label: str
    adapters: int
    usable: int
    rest: bool = False


class PoolPoint(NamedTuple):
    """An adapter's place on a map of its pool."""

    id: str
    status: Status
    x: float
    y: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolMap:
    """Adapters of one base in a plane: near ones are alike.

    `usable` is the number of its usable adapters, drawn or not. `shares` are those of the whole spread that lie along
    x and along y.
    """

    base: str
    points: Sequence[PoolPoint]
    usable: int
    shares: tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolReport:
    """A catalogue, or the part of it for which `conditions` hold: its adapters, and their number by title and label.

    `last_sync` is the time of the catalogue's last sync, "" if there was none. `map` is None without sketches.
    Everything in it depends on the catalogue alone.
    """

    adapters: Sequence[ReportedAdapter]
    total: Share
    counts: Mapping[str, Sequence[Share]]
    authors: int
    bytes: int
    last_sync: str
    conditions: Sequence[str]
    map: PoolMap | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One line of a task file.

    `prompt` is plain text or a chat, a tuple of messages with all their keys. `completion` is the text of the answer,
    `answer` the further keys of its message besides role and text, such as tool calls. `extras` are the other parts of
    the line for a chat template: tools and documents.
    """

    id: str
    prompt: Prompt
    completion: str
    choices: tuple[str, ...] = ()
    answer: Mapping[str, Any] = field(default_factory=dict)
    extras: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Coefficients:
    """The coefficients from `fit`: for each module, one factor per adapter, or per rank of each adapter.

    `values[module][i]` belongs to `adapters[i]` (`id@commit`): a tuple of one factor, or of one per rank. The factors
    are final: the activation is already applied. `task_sha256` names the data they were learnt on. `trained` is True if
    they belong to factors that the fit trained too, and not to the adapters as they are.
    """

    adapters: tuple[str, ...]
    values: Mapping[str, tuple[tuple[float, ...], ...]]
    granularity: str
    activation: str
    task_sha256: str
    base: str
    trained: bool = False

    @property
    def stored(self) -> dict[str, Any]:
        """The coefficients as their file and their hash hold them."""
        found = asdict(self)
        return found if self.trained else {name: value for name, value in found.items() if name != "trained"}

    @property
    def sha256(self) -> str:
        """The hash of these coefficients, as 64 hex digits."""
        return hashlib.sha256(json.dumps(self.stored, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One system's result on one task. `low`..`high` is the 95 % interval of `value`.

    `delta` with its interval is the paired difference to `baseline`, `p` that of "no difference", and `p_holm` the same
    corrected for the number of systems. `changed` counts the prompts whose output differs from the base model's, `cut`
    the outputs that reached the limit of new tokens without an end and are not right.
    """

    system: str
    metric: str
    value: float
    low: float
    high: float
    n: int
    baseline: str = ""
    delta: float | None = None
    delta_low: float | None = None
    delta_high: float | None = None
    p: float | None = None
    p_holm: float | None = None
    changed: int | None = None
    log_likelihood: float | None = None
    tokens_per_second: float | None = None
    cut: int | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def measurable(self) -> bool:
        """Whether the difference to the baseline is beyond chance: the interval excludes 0, and `p_holm` is < 5 %."""
        if self.delta_low is None or self.delta_high is None or self.p is None:
            return False
        p = self.p if self.p_holm is None else self.p_holm
        return p < LEVEL and not self.delta_low <= 0 <= self.delta_high


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScore:
    """One system's value of one metric of one task, as lm-evaluation-harness computes it.

    `stderr` is the harness's; where it has none it is None, and so are `low` and `high`, the 95 % interval. `higher`
    tells whether a higher value is better, None if the harness does not say. `delta` with its interval is the paired
    difference to `baseline`, `p` that of "no difference", and `p_holm` the same corrected for the number of systems;
    None where the metric is no mean over examples.
    """

    system: str
    task: str
    metric: str
    value: float
    stderr: float | None
    low: float | None
    high: float | None
    n: int
    higher: bool | None
    baseline: str = ""
    delta: float | None = None
    delta_low: float | None = None
    delta_high: float | None = None
    p: float | None = None
    p_holm: float | None = None
