"""From the user's request for tasks of lm-evaluation-harness to scores, recorded as a run."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from lora_cli.catalogue import runs
from lora_cli.errors import OutputError
from lora_cli.files import read_regular
from lora_cli.formats.run_record import key_of
from lora_cli.harness_options import HarnessOptions
from lora_cli.models import harness
from lora_cli.models.generate import PROMPTS_AT_ONCE
from lora_cli.models.harness import Harness, HarnessTask, Measured
from lora_cli.models.ref import BaseRef, pin
from lora_cli.outputs import whole_file
from lora_cli.records import Progress, TaskScore, silent
from lora_cli.scores import Z95, holm, interval, paired_difference
from lora_cli.settings import Settings, base_of
from lora_cli.steps.evaluate.evaluate import System, demand_systems
from lora_cli.steps.evaluate.systems import distinct, opened_systems
from lora_cli.steps.opened_pool import Pool
from lora_cli.text import counted


@dataclass(frozen=True, slots=True, kw_only=True)
class HarnessRow:
    """What the harness found for one system on one task of the request. `key` identifies all that decides it."""

    system: str
    name: str
    key: str
    measured: tuple[Measured, ...]


class HarnessRequest:
    """Adapters beside the bare base on tasks of the harness, on one load of the base.

    Raises:
        NothingMatched: no system of the name of the baseline, or no such task.
        UsageError: no base model, no harness, or a task file that is not trusted. Else as `Pool.adapters` does.
    """

    def __init__(
        self,
        pool: Pool,
        names: Sequence[str],
        settings: Settings,
        options: HarnessOptions,
        *,
        baseline: str = "base",
        batch_size: int | None = None,
    ) -> None:
        self.pool, self.settings, self.options = pool, settings, options
        self.baseline, self.batch_size = baseline, batch_size or PROMPTS_AT_ONCE
        base, systems = base_of(settings), distinct(names)
        demand_systems(["base", *systems], baseline=baseline)
        pool.progress("tasks of lm-evaluation-harness", 0, 0)
        self.tasks = harness.load_tasks(options)
        pool.announce(
            f"eval: {counted(len(self.tasks), 'task')} of lm-evaluation-harness {harness.version()}; "
            f"baseline {baseline}; base {base}"
        )
        ref = pin(base, device=settings.device, dtype=settings.dtype, progress=pool.progress)
        found = opened_systems(pool, names)
        self.ref: BaseRef = replace(ref, name=found.base)
        self.inputs = {**self.ref.inputs, **found.inputs, **{task.name: task.sha256 for task in self.tasks}}
        self.systems = [System(name="base"), *found.systems]

    @cached_property
    def run_settings(self) -> dict[str, Any]:
        """The settings of the run."""
        return {
            **self.ref.settings,
            **self.options.settings,
            "lm_eval": harness.version(),
            "baseline": self.baseline,
            "seed": self.settings.seed,
        }

    def rows(self, out: Path | None = None) -> Path:
        """The file that holds what was found for each system on each task."""
        return out or self.settings.runs / f"harness-{key_of('harness', self.run_settings, self.inputs)[:8]}.jsonl"

    def run(
        self, db: Path, *, out: Path | None = None, resume: bool = True, progress: Progress = silent
    ) -> list[TaskScore]:
        """Score every system on every task, and record the run and its scores.

        What `out` holds is not computed again, unless `resume` is False.
        """
        rows = self.rows(out)
        with runs.recorded(db, "harness", self.run_settings, self.inputs, rows) as run:
            run.device = self.ref.device
            stored = read_rows(rows)  # in any case: another file is not replaced
            found = self._found(rows, stored if resume else [], progress)
            scores = list(self._scores(found))
            run.results["scores"] = [asdict(score) for score in scores]
            versions = {system.name: [system.version] for system in self.systems[1:]}
            for task, sha256 in self._parts(found).items():
                of_task = [score for score in scores if score.task == task]
                called = task if self.options.limit is None else f"{task}[:{self.options.limit}]"
                runs.add_scores(db, run, of_task, versions, sha256, called=called)
        return scores

    def _found(self, path: Path, stored: Sequence[HarnessRow], progress: Progress) -> dict[tuple[str, str], HarnessRow]:
        """The row of each system and task, those that are stored and those that are found now and written to `path`."""
        keys = {(system.name, task.name): self._key(system, task) for system in self.systems for task in self.tasks}
        found = {(row.system, row.name): row for row in stored if keys.get((row.system, row.name)) == row.key}
        if len(found) == len(keys):
            return found
        base = self.ref.load(progress)
        for system in self.systems:
            base.check(system.shapes, system.name)
        model = Harness(base, batch_size=self.batch_size, progress=progress)
        for system in self.systems:
            left = [task for task in self.tasks if (system.name, task.name) not in found]
            with system.applied(base) if left else nullcontext():
                for task in left:
                    measured = model.measure(task, limit=self.options.limit, who=system.name)
                    key = keys[system.name, task.name]
                    row = HarnessRow(system=system.name, name=task.name, key=key, measured=tuple(measured))
                    found[system.name, task.name] = row
                    _write(path, found.values())
        return found

    def _key(self, system: System, task: HarnessTask) -> str:
        deciding = {**self.run_settings, "harness": task.name, "baseline": "", "seed": 0}
        return key_of("harness", deciding, {**self.ref.inputs, "system": system.version, "task": task.sha256})

    def _parts(self, found: Mapping[tuple[str, str], HarnessRow]) -> dict[str, str]:
        """The SHA-256 of each task that was measured, by the harness's name for it."""
        return {one.task: task.sha256 for task in self.tasks for one in found[self.systems[0].name, task.name].measured}

    def _scores(self, found: Mapping[tuple[str, str], HarnessRow]) -> Iterator[TaskScore]:
        """The scores by task and metric, those of all systems side by side."""
        for task in self.tasks:
            by_system = {
                system.name: {(one.task, one.metric): one for one in found[system.name, task.name].measured}
                for system in self.systems
            }
            for metric, reference in by_system[self.baseline].items():
                scores = [
                    self._score(name, measured[metric], None if name == self.baseline else reference)
                    for name, measured in by_system.items()
                    if metric in measured
                ]
                corrected = iter(holm([score.p for score in scores if score.p is not None]))
                yield from (score if score.p is None else replace(score, p_holm=next(corrected)) for score in scores)

    def _score(self, system: str, one: Measured, reference: Measured | None) -> TaskScore:
        low, high = self._interval(one)
        score = TaskScore(
            system=system,
            task=one.task,
            metric=one.metric,
            value=one.value,
            stderr=one.stderr,
            low=low,
            high=high,
            n=one.n,
            higher=one.higher,
        )
        if reference is None or reference.values is None or one.values is None:
            return score
        difference = paired_difference(one.values, reference.values, seed=self.settings.seed)
        return replace(
            score,
            baseline=self.baseline,
            delta=difference.delta,
            delta_low=difference.low,
            delta_high=difference.high,
            p=difference.p,
        )

    def _interval(self, one: Measured) -> tuple[float | None, float | None]:
        """The 95 % interval: as in any evaluation for a mean over examples, else by the harness's standard error."""
        if one.values is not None:
            return interval("share" if {*one.values} <= {0.0, 1.0} else "mean", one.values, seed=self.settings.seed)
        if one.stderr is None:
            return None, None
        return one.value - Z95 * one.stderr, one.value + Z95 * one.stderr


def read_rows(path: Path) -> list[HarnessRow]:
    """The rows in a file, none if there is no file. OutputError for a file that holds something else."""
    try:
        return [msgspec.json.decode(line, type=HarnessRow) for line in read_regular(path).splitlines()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, msgspec.DecodeError) as error:
        raise OutputError(
            f"{path}: not a file of rows of lm-evaluation-harness", hint="choose another file with -o"
        ) from error


def _write(path: Path, rows: Any) -> None:
    with whole_file(path) as file:
        file.write(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
