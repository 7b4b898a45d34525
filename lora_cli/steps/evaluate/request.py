"""From the user's request for an evaluation to scores, recorded as a run."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lora_cli.catalogue import runs
from lora_cli.errors import DataError, NothingMatched, UsageError
from lora_cli.formats.kinds import CONFIG_NAME
from lora_cli.formats.router import ROUTER_FILE
from lora_cli.formats.run_record import key_of
from lora_cli.metrics import METRICS
from lora_cli.models.forms import Prompting
from lora_cli.models.ref import pin
from lora_cli.precision import FOUR_BIT, torch_dtype
from lora_cli.recipes import EvalOptions
from lora_cli.records import Progress, Score, silent
from lora_cli.settings import Settings, base_of
from lora_cli.steps.evaluate.answers import DATA_FILE
from lora_cli.steps.evaluate.choices import demand_choices
from lora_cli.steps.evaluate.evaluate import System, demand_systems, evaluate, measured, read_rows, row_keys
from lora_cli.steps.evaluate.learnt import learnt, trained_on
from lora_cli.steps.evaluate.systems import distinct, opened_systems
from lora_cli.steps.opened_pool import Pool
from lora_cli.steps.task_view import look, summary_of
from lora_cli.task import Task, read_task
from lora_cli.text import counted


class EvaluateRequest:
    """Adapters beside the bare base on a task, on one load of the base.

    Raises:
        NothingMatched: no system of the name of the baseline.
        UsageError: no base model, or no task. DataError: a malformed task. Else as `Pool.adapters` does.
    """

    def __init__(
        self,
        pool: Pool,
        names: Sequence[str],
        settings: Settings,
        options: EvalOptions | None = None,
        prompting: Prompting | None = None,
    ) -> None:
        self.pool, self.settings, self.options = pool, settings, options or EvalOptions()
        base, systems = base_of(settings), distinct(names)
        demand_systems(["base", *systems], baseline=self.options.baseline)
        self.task = test_data(settings)
        self.metric = METRICS.get(self.options.metric)
        if self.metric.kind == "choice":
            demand_choices(self.task.examples, file=self.task.file.name)
        origin = "the validation part of the last fit" if settings.test is None else settings.origin("test")
        pool.announce(
            f"eval: {counted(len(self.task.examples), 'example')} of {self.task.file.name} ({origin}); "
            f"baseline {self.options.baseline}; base {base}"
        )
        ref = pin(
            base,
            name=base,  # until the adapters tell its public name
            device=settings.device,
            dtype=settings.dtype,
            prompting=prompting or Prompting(),
            progress=pool.progress,
        )
        found = opened_systems(pool, names)
        self.ref = replace(ref, name=found.base)
        self.inputs = {**self.ref.inputs, **found.inputs, self.task.file.name: self.task.sha256}
        self.systems = [System(name="base"), *found.systems]
        self.trained = dict(
            zip(systems, trained_on(found.refs, self.task, [settings.data, settings.test]), strict=True)
        )

    @cached_property
    def run_settings(self) -> dict[str, Any]:
        """The settings of the run."""
        return {
            **self.ref.settings,
            "metric": self.options.metric,
            **self.options.knobs,
            "baseline": self.options.baseline,
            "max_new_tokens": self.options.max_new_tokens,
            "seed": self.settings.seed,
            "data": self.task.file.name,
            "examples": len(self.task.examples),
        }

    def rows(self, out: Path | None = None) -> Path:
        """The file that holds an answer of each system to each example."""
        return out or self.settings.runs / f"eval-{key_of('eval', self.run_settings, self.inputs)[:8]}.jsonl"

    def stored(self, out: Path | None = None) -> int:
        """How many answers that are asked for are there already."""
        ref = self.ref
        arithmetic = f"{torch_dtype(ref.compute)}{f' {FOUR_BIT}' if ref.four_bit else ''}"
        common = [f"{ref.name}@{ref.version}", arithmetic, ref.prompting.settings]
        what = measured(self.metric, self.options, self.options.knobs)
        keys = row_keys(self.systems, self.task.examples, common, what)
        return sum(keys.get((row.system, row.id)) == row.key for row in read_rows(self.rows(out)))

    def run(
        self, db: Path, *, out: Path | None = None, resume: bool = True, progress: Progress = silent
    ) -> list[Score]:
        """Score every system, and record the run and its scores.

        Answers that `out` holds are not computed again, unless `resume` is False.
        """
        self.rows_file = self.rows(out)
        with runs.recorded(db, "eval", self.run_settings, self.inputs, self.rows_file) as run:
            run.device = self.ref.device
            run.results[DATA_FILE] = str(self.task.file.absolute())
            loaded = self.ref.load(progress)
            self.facts = look(self.task.examples, loaded.encoder)
            for line in [*summary_of(self.facts), *self.familiar()]:
                self.pool.announce(line)
            scores = evaluate(
                loaded,
                self.systems,
                self.task.examples,
                self.options,
                seed=self.settings.seed,
                rows_path=self.rows_file,
                resume=resume,
                progress=progress,
            )
            scores = [self._with_what_was_learnt(score) for score in scores]
            versions = {system.name: [system.version] for system in self.systems[1:]}
            runs.add_scores(db, run, scores, versions, self.task.sha256)
        return scores

    def familiar(self) -> Iterator[str]:
        """A line for each system that was trained on examples of the task, or on data that is gone."""
        for name, trained in self.trained.items():
            if trained is not None and trained.examples is None:
                yield f"note: {trained.name}, on which {name} was trained, is not here to be compared with this data"
            elif trained is not None and trained.examples:
                of = counted(len(self.task.examples), "example")
                was = "was" if trained.examples == 1 else "were"
                yield f"warning: {trained.examples:,} of {of} {was} trained on by {name}, which flatters its score"

    def _with_what_was_learnt(self, score: Score) -> Score:
        trained = self.trained.get(score.system)
        return score if trained is None else replace(score, details={**score.details, "trained_on": trained.examples})


def last_written(db: Path) -> list[str]:
    """The adapters that merge, fit and train wrote last; NothingMatched if there are none."""
    found = [runs.latest_output(db, [command], CONFIG_NAME, ROUTER_FILE) for command in ("merge", "fit", "train")]
    names = [str(output[1]) for output in found if output is not None]
    if not names:
        raise NothingMatched("no adapters named, and none written yet", hint="run lora merge or lora fit, or name some")
    return names


def test_data(settings: Settings) -> Task:
    """The task to evaluate on: that of --data or `test`, else the last fit's, with its validation part alone.

    Raises:
        UsageError: no test data and no last fit.
        DataError: the file of the last fit has changed or is gone, or its record does not name it.
    """
    if settings.test is not None:
        return read_task(settings.test)

    last = runs.latest_output(settings.db, ["fit"], CONFIG_NAME)
    if last is None:
        raise UsageError("no test data", hint="give --data FILE.jsonl, or set test in lora.toml")
    try:
        data = learnt(last[1])
    except DataError as error:
        raise DataError(error.message, hint="give --data FILE.jsonl") from None
    task = data.validation([settings.data])
    if task is None:
        raise DataError(
            f"{data.valid[0] or data.name}, the data of the last fit, is not in this folder or has changed",
            hint="give --data FILE.jsonl",
        )
    return task
