"""The adapters of a pool on one task: judged in groups on one load of the base, each score kept in the catalogue."""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, NamedTuple, Self

from lora_cli.catalogue import runs, scores
from lora_cli.catalogue.scores import StoredScore
from lora_cli.errors import AccessDenied, DataError, NothingMatched, Refused
from lora_cli.formats.base_names import public_base
from lora_cli.formats.run_record import Run, key_of
from lora_cli.metrics import METRICS
from lora_cli.models.base_model import BaseModel
from lora_cli.models.forms import Prompting
from lora_cli.models.ref import pin
from lora_cli.names import unpinned
from lora_cli.recipes import EvalOptions
from lora_cli.records import Example, Progress, Score
from lora_cli.settings import Settings, base_of
from lora_cli.steps.evaluate.answers import DATA_FILE
from lora_cli.steps.evaluate.choices import demand_choices
from lora_cli.steps.evaluate.evaluate import System, Updates, evaluate
from lora_cli.steps.opened_pool import Pool
from lora_cli.steps.pool.fetch import refused
from lora_cli.steps.pool.lookup import names_of
from lora_cli.steps.select.rows import PoolRows
from lora_cli.steps.task_view import look, summary_of
from lora_cli.task import Task
from lora_cli.text import counted

_TOGETHER = 32
"""Adapters that are open at a time; the engine may put them into one batch."""
_OF_ADAPTERS = (Refused, DataError, NothingMatched, AccessDenied)
BASE = "base"


class PoolScore(NamedTuple):
    """An adapter's score on the first `n` examples, 0 for an unknown number; `low`..`high` is its 95 % interval."""

    value: float
    n: int
    low: float | None = None
    high: float | None = None
    log_likelihood: float | None = None
    imported: bool = False


class PoolTrial:
    """A task that the adapters of a pool answer; use it in a `with` statement.

    The examples have an order of their own, by a hash of seed and id. The base is loaded when the first answer is
    asked for, and the run is recorded then. Answers are stored as they come, in `rows`; scores on all examples as soon
    as a group of adapters has them, in the catalogue. `failed` says of each adapter that cannot be judged, by id, why.

    Raises:
        UsageError: no base model. DataError: an example without what the metric judges. Else as `pin` does.
    """

    def __init__(
        self, pool: Pool, task: Task, settings: Settings, options: EvalOptions, prompting: Prompting | None = None
    ) -> None:
        self._pool, self.task, self._settings, self.options = pool, task, settings, options
        base = base_of(settings)
        self.metric = METRICS.get(options.metric)
        if self.metric.kind == "choice":
            demand_choices(task.examples, file=task.file.name)
        self.examples = sorted(
            task.examples, key=lambda one: hashlib.sha256(f"{settings.seed}\n{one.id}".encode()).digest()
        )
        known = names_of(pool.catalogue, base, settings.base_aliases)
        self._ref = pin(
            base,
            name=public_base(base, known),
            device=settings.device,
            dtype=settings.dtype,
            prompting=prompting or Prompting(),
            progress=pool.progress,
        )
        self.failed: dict[str, str] = {}
        self.base: PoolScore | None = None
        # Not the adapters: what a run names stays in the Hub's cache, and each score has its adapter's commit.
        self._inputs = {**self._ref.inputs, task.file.name: task.sha256}
        self._here: set[str] = set()
        self._known: dict[str, PoolScore] = {}
        self._stack = ExitStack()
        self._loaded: BaseModel | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the run."""
        options = self.options
        return {
            **self._ref.settings,
            "metric": options.metric,
            **options.knobs,
            "max_new_tokens": options.max_new_tokens,
            "seed": self._settings.seed,
            "data": self.task.file.name,
            "examples": len(self.examples),
        }

    def known(self, names: Sequence[str]) -> dict[str, PoolScore]:
        """The stored scores on all examples of these adapters (`id@commit`): imported ones, and those measured alike.

        The newest counts. One that was measured with another base, precision, prompting or metric's option does not.
        """
        label, db = f"{self.task.file.name}@{self.task.sha256[:8]}", self._pool.catalogue.path
        records = scores.records_of(db, label, self.options.metric)
        alike = {run for run, record in records.items() if self._is_alike(record)}
        for own in scores.of_base(db, label, self.options.metric):
            self.base = _as_known(own) if own.run in alike else self.base
        commits = dict(name.rpartition("@")[::2] for name in names)
        for one in scores.on_task(db, label, self.options.metric):
            commit = commits.get(one.id)
            if commit is None or one.commit not in ("", commit) or not (one.imported or one.run in alike):
                continue
            self._known[f"{one.id}@{commit}"] = _as_known(one)
        return {name: self._known[name] for name in names if name in self._known}

    def judge(self, names: Sequence[str], count: int) -> dict[str, PoolScore]:
        """The scores of adapters (`id@commit`) on the first `count` examples, without those that `failed`.

        Raises:
            NetworkError: weights that cannot be fetched now. OutputError: the rows cannot be written.
            Refused, DataError: the base itself cannot answer the task.
        """
        whole = count == len(self.examples)
        found = {name: self._known[name] for name in names if whole and name in self._known}
        missing = sorted(name for name in names if name not in found and unpinned(name) not in self.failed)
        if not missing:
            return found
        if self._loaded is None:
            self._begin()
        self._fetch(missing)
        missing = [name for name in missing if unpinned(name) not in self.failed]
        report = _Counted(self._pool.progress, len(missing) * count, count)
        for start in range(0, len(missing), _TOGETHER):
            group = self._scored(missing[start : start + _TOGETHER], count, report)
            if whole:
                self._keep(group)
            found |= {self._pinned[score.system]: _as_pool_score(score) for score in group}
        self._known |= found if whole else {}
        return found

    def _is_alike(self, record: Mapping[str, Any]) -> bool:
        """Whether a recorded run measured what this one would."""
        deciding = ["dtype", "prompting", "metric", *self.options.knobs]
        deciding += ["max_new_tokens"] if self.metric.kind == "output" else []
        versions = [value for name, value in record["inputs"].items() if name.startswith("base:")]
        theirs, ours = record["settings"], self.settings
        return versions == [self._ref.version] and all(theirs.get(name) == ours.get(name) for name in deciding)

    def _begin(self) -> None:
        """Load the base, record the run, open the rows, and see that the base itself can answer."""
        key = key_of("pool-evaluate", self.settings, self._inputs)
        path = self._settings.runs / f"pool-evaluate-{key[:8]}.jsonl"
        self._rows = self._stack.enter_context(PoolRows(path))
        db = self._pool.catalogue.path
        self._run: Run = self._stack.enter_context(
            runs.recorded(db, "pool-evaluate", self.settings, self._inputs, path)
        )
        self._run.device = self._ref.device
        self._run.results[DATA_FILE] = str(self.task.file.absolute())
        self._loaded = self._ref.load(self._pool.progress)
        for line in summary_of(look(self.task.examples, self._loaded.encoder)):
            self._pool.announce(line)
        self._pinned: dict[str, str] = {}
        with self._rows.lent([BASE]) as lent:
            [score] = evaluate(
                self._loaded, [System(name=BASE)], self.examples, self.options, seed=self._settings.seed, rows_path=lent
            )
        self.base = _as_pool_score(score)
        runs.add_scores(db, self._run, [score], {}, self.task.sha256)

    def _fetch(self, names: Sequence[str]) -> None:
        """Bring the weights of adapters to this machine."""
        new = [name for name in names if name not in self._here]
        wanted = {*new}
        rows = self._pool.catalogue.rows([unpinned(name) for name in new], base=self._pool.base)
        # A selection may hold an older commit: that one is fetched when it is opened.
        refs = [row.ref for row in rows if row.ref.pinned in wanted]
        for adapter, reason in refused(self._pool.catalogue, refs, self._pool.announce, self._pool.progress):
            self._leave_out(adapter.id, reason)
        self._here.update(new)

    def _scored(self, names: Sequence[str], count: int, report: "_Counted") -> list[Score]:
        """The scores of a group, without adapters that cannot be judged: halves find them, and answers are kept."""
        try:
            return self._evaluated(names, self.examples[:count], report)
        except _OF_ADAPTERS as error:
            if len(names) == 1:
                id = unpinned(names[0])
                self._leave_out(id, error.message.removeprefix(f"{id}: "))
                return []
        half = len(names) // 2
        return [*self._scored(names[:half], count, report), *self._scored(names[half:], count, report)]

    def _evaluated(self, names: Sequence[str], examples: Sequence[Example], report: "_Counted") -> list[Score]:
        assert self._loaded is not None
        gathered = self._pool.quiet.adapters(names)  # an adapter's notes are those of its check
        ids = {unpinned(name): name for name in names}
        systems = [
            System(name=id, updates=Updates(adapter), version=adapter.ref.pinned)
            for id, adapter in zip(ids, gathered.adapters, strict=True)
        ]
        with self._rows.lent([BASE, *ids]) as lent:
            _, *found = evaluate(
                self._loaded,
                [System(name=BASE), *systems],
                examples,
                self.options,
                seed=self._settings.seed,
                rows_path=lent,
                progress=report,
            )
        report.end_group()
        self._pinned |= ids
        for score in found:
            if failures := score.details.get("not_finite"):
                precision = self._loaded.dtype_name
                self._leave_out(
                    score.system, f"not finite in {precision} on {counted(failures, 'example')} of {score.n}"
                )
        return [score for score in found if score.system not in self.failed]

    def _keep(self, group: Sequence[Score]) -> None:
        """Store scores on all examples."""
        versions = {score.system: [self._pinned[score.system]] for score in group}
        runs.add_scores(self._pool.catalogue.path, self._run, group, versions, self.task.sha256)
        self._run.results["scored"] = self._run.results.get("scored", 0) + len(group)

    def _leave_out(self, id: str, reason: str) -> None:
        self.failed[id] = reason
        self._run.results["failed"] = self.failed
        self._pool.announce(f"{id} left out: {reason}")


class _Counted:
    """The Progress of evaluations of some adapters beside the base as one of all their answers, `total`.

    The base's own `own` answers are there before each evaluation.
    """

    def __init__(self, progress: Progress, total: int, own: int) -> None:
        self._progress, self._total, self._own = progress, total, own
        self._before = self._now = 0

    def __call__(self, what: str, done: int, total: int) -> None:
        self._now = done - self._own
        self._progress("evaluating adapters", self._before + self._now, self._total)

    def end_group(self) -> None:
        """The next calls are about other adapters."""
        self._before, self._now = self._before + self._now, 0


def _as_known(one: StoredScore) -> PoolScore:
    return PoolScore(one.value, one.n, one.low, one.high, one.log_likelihood, one.imported)


def _as_pool_score(score: Score) -> PoolScore:
    return PoolScore(score.value, score.n, score.low, score.high, score.log_likelihood)
