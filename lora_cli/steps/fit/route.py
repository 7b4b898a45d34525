"""From the user's request for a router to a job that is ready to run."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_cli.algebra.routing import Routing
from lora_cli.errors import Refused, UsageError
from lora_cli.formats.run_record import Run
from lora_cli.merge_options import MergeOptions
from lora_cli.models.forms import Prompting
from lora_cli.models.ref import pin
from lora_cli.models.router import demand_by_token
from lora_cli.recipes import FIT_METHODS, FitOptions, Recipe, Shape
from lora_cli.records import Adapter, Progress, silent
from lora_cli.settings import Settings, base_of
from lora_cli.steps.fit.fit import NOISES
from lora_cli.steps.fit.write_router import Measuring, RoutePlan, RouteReport, write_router
from lora_cli.steps.merge.stream import plan
from lora_cli.steps.opened_pool import Gathered, Pool
from lora_cli.steps.recorded import Finished, Job, run_once
from lora_cli.task import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteJob:
    """A router that is planned. `measuring` is what it is measured on, None without examples."""

    plan: RoutePlan
    job: Job
    measuring: Measuring | None
    notice: str

    def run(self, db: Path, *, force: bool = False, progress: Progress = silent) -> Finished[RouteReport]:
        """Write the router, unless it is there; see `run_once` and `write_router`."""

        def work(run: Run) -> RouteReport:
            return write_router(self.plan, self.job.folder, run, self.measuring, replace=force, progress=progress)

        return run_once(db, self.job, work, force=force, progress=progress)


class RouteRequest:
    """The user's request for a router over adapters.

    Args:
        shape: a preset that makes a router.
        task: examples to measure it on, None for none.

    Raises:
        UsageError: options of a fit that learns, a control without examples, or examples without a base model.
        DataError: a task of one example.
    """

    def __init__(
        self,
        pool: Pool,
        names: Sequence[str],
        settings: Settings,
        shape: Shape,
        recipe: Recipe | None = None,
        options: FitOptions | None = None,
        *,
        task: Task | None = None,
    ) -> None:
        self.pool, self.names, self.settings, self.shape, self.task = pool, names, settings, shape, task
        self.controls = _checked(shape, recipe or Recipe(), options or FitOptions(), measured=task is not None)
        if task is not None:
            base_of(settings)
            task.held.demand_parts(task.examples)

    def absent(self) -> list[Adapter]:
        """The adapters whose weights would have to be downloaded."""
        return self.pool.absent(self.names)

    def prepare(self, prompting: Prompting | None = None, *, out: Path | None = None) -> RouteJob:
        """Open the adapters, downloading missing files, and check everything that needs no weights.

        Raises:
            Refused: the modules of the base are not known, or one is no linear layer or embedding. Else as
                `Pool.adapters` and `steps.merge.plan` do.
        """
        gathered = self.pool.adapters(self.names, passed_on=True)
        planned, measuring = self._planned(gathered), self._measuring(prompting, gathered.base)
        settings = {**self.shape.settings, "base": gathered.base}
        inputs = dict(gathered.inputs)
        if measuring is not None:
            settings |= measuring.settings
            inputs |= measuring.inputs
        job = Job(
            verb="fit",
            settings=settings,
            inputs=inputs,
            runs=self.settings.runs,
            out=out,
            device="cpu" if measuring is None else measuring.ref.device,
        )
        return RouteJob(plan=planned, job=job, measuring=measuring, notice=gathered.notice)

    def _planned(self, gathered: Gathered) -> RoutePlan:
        if gathered.skeleton is None:
            raise Refused(
                f"a router needs to know the base's modules: {gathered.unchecked}",
                hint="give --base, a folder or a Hub id",
            )
        merging = plan(
            gathered.adapters,
            [1.0] * len(gathered.adapters),
            MergeOptions(method="cat"),
            base=gathered.base,
            skeleton=gathered.skeleton,
            terms=gathered.terms,
        )
        demand_by_token(gathered.skeleton, merging.modules)
        routing: Routing = FIT_METHODS.load(self.shape.preset)(len(merging.adapters), **self.shape.knobs)
        return RoutePlan(
            preset=self.shape.preset,
            knobs=self.shape.knobs,
            routing=routing,
            skeleton=gathered.skeleton,
            merging=merging,
        )

    def _measuring(self, prompting: Prompting | None, base: str) -> Measuring | None:
        if self.task is None:
            return None
        settings = self.settings
        ref = pin(
            base_of(settings),
            device=settings.device,
            dtype=settings.dtype,
            prompting=prompting or Prompting(),
            progress=self.pool.progress,
        )
        ref = dataclasses.replace(ref, name=base)
        return Measuring(ref=ref, task=self.task, controls=self.controls, seed=settings.seed)


def _checked(shape: Shape, recipe: Recipe, options: FitOptions, *, measured: bool) -> list[str]:
    """The controls. UsageError for options that a router has no use for."""
    shape.completed(recipe)
    usual = FitOptions()
    for name in ("rank", "energy", "target", "seeds", "time_limit", "grad_checkpointing"):
        if getattr(options, name) != getattr(usual, name):
            hint = "name that adapter among the others" if name == "target" else f"its options are {_flags(shape)}"
            raise UsageError(
                f"{shape.preset} takes no --{name.replace('_', '-')}: it makes a router, which learns nothing",
                hint=hint,
            )
    for control in options.controls:
        if control == "target":
            raise UsageError(
                f"{shape.preset} takes no --control target: a router learns nothing",
                hint="train one with lora train, and compare by lora eval",
            )
        if control not in NOISES:
            raise UsageError(f"unknown control {control!r}", hint=f"one of {', '.join([*NOISES, 'base'])}")
    if options.controls and not measured:
        raise UsageError("--control compares by examples", hint="give --data FILE.jsonl")
    return options.controls


def _flags(shape: Shape) -> str:
    return ", ".join(f"--{knob.replace('_', '-')}" for knob in shape.knobs)
