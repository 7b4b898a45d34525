"""From the user's request for a fit to a job that is ready to run."""

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from lora_cli.errors import UsageError
from lora_cli.fit_methods import Learning
from lora_cli.formats.run_record import Run, made_by
from lora_cli.merge_options import MergeOptions
from lora_cli.models.forms import Prompting
from lora_cli.models.ref import BaseRef, pin
from lora_cli.recipes import FIT_METHODS, FitOptions, Recipe, Shape
from lora_cli.records import Adapter, Progress, silent
from lora_cli.settings import Settings, base_of
from lora_cli.steps.evaluate.choices import demand_choices
from lora_cli.steps.fit.command import Command
from lora_cli.steps.fit.fit import Fitting, demand_sane, run_settings
from lora_cli.steps.fit.write import FitReport, fit_and_write, forget_states
from lora_cli.steps.merge.plan import checked_options
from lora_cli.steps.merge.stream import MergePlan, plan
from lora_cli.steps.opened_pool import Pool
from lora_cli.steps.recorded import Finished, Job, run_once
from lora_cli.steps.task_view import look, summary_of
from lora_cli.steps.train.batch import batch_note, within
from lora_cli.task import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class FitJob:
    """A fit that is planned. `target` is the `id@commit` of the adapter trained on the task itself, if there is one."""

    request: "FitRequest"
    plan: MergePlan
    job: Job
    ref: BaseRef
    target: str
    notice: str

    def run(
        self, db: Path, *, force: bool = False, resume: bool = True, progress: Progress = silent
    ) -> Finished[FitReport]:
        """Fit, unless the result is there; see `run_once` and `steps.fit.write.fit_and_write`.

        Raises Partial where the time limit, which begins here, came before the end.
        """
        request, task, options = self.request, self.request.task, self.request.options
        minutes = math.inf if options.time_limit is None else options.time_limit
        how = Fitting(
            shape=request.shape,
            recipe=request.recipe,
            held=task.held,
            target=self.target,
            controls=options.controls,
            task_sha256=task.sha256,
            seeds=options.seeds,
            recompute=options.grad_checkpointing,
            command=request.command,
            plan=self.plan,
            deadline=time.monotonic() + 60 * minutes,
        )

        def work(run: Run) -> FitReport:
            request.pool.announce(f"fit: {task.parts_in_words(request.recipe.seed)}; base {request.base}")
            for line in batch_note(request.asked, request.recipe):
                request.pool.announce(line)
            loaded = self.ref.load(progress)
            if request.shape.labelled:
                for line in summary_of(look(task.examples, loaded.encoder, seed=request.recipe.seed, held=task.held)):
                    request.pool.announce(line)
            if not resume:
                forget_states(self.job.folder, run)
            return fit_and_write(
                loaded,
                self.plan,
                task.examples,
                self.job.folder,
                run,
                how,
                replace_folder=force or made_by(self.job.folder, self.job.key) == "unfinished",
                progress=progress,
            )

        done = run_once(db, self.job, work, force=force, progress=progress)
        if done.report is None:  # killed between the result and its last step, the fit left them
            forget_states(self.job.folder, done.run)
        return done


class FitRequest:
    """The user's request for a fit: adapters, task, how coefficients are learnt and compared.

    Raises:
        UsageError: an unknown control, options that the preset has no use for, or no base model.
        DataError: a task of one example.
    """

    def __init__(
        self,
        pool: Pool,
        names: Sequence[str],
        task: Task,
        settings: Settings,
        shape: Shape | None = None,
        recipe: Recipe | None = None,
        options: FitOptions | None = None,
    ) -> None:
        self.pool, self.task, self.settings = pool, task, settings
        self.shape, self.options = shape or Shape(), options or FitOptions()
        self.asked = self.shape.completed(replace(recipe or Recipe(), seed=settings.seed))
        self.base = base_of(settings)
        task.held.demand_parts(task.examples)
        # A search reads all examples at once.
        searches = FIT_METHODS.get(self.shape.preset).kind == "search"
        self.recipe = self.asked if searches else within(self.asked, task.learnt)
        demand_sane(self.shape, self.options.controls)
        self.command = self._command()
        self.merging = checked_options(
            MergeOptions(method="linear", rank=self.options.rank, energy=self.options.energy)
        )
        self.names = [*names, *([] if self.options.target is None else [self.options.target])]

    def _command(self) -> Command | None:
        """The command that is the objective, None for none.

        UsageError for one that cannot be run, or a time limit of none. DataError for examples without the choices that
        the metric judges.
        """
        text, minutes = self.shape.command, self.options.command_timeout
        if text:
            return Command(text=text, seconds=math.inf if minutes is None else 60 * minutes)
        if minutes is not None:
            raise UsageError("--command-timeout is for an --objective that is a command", hint="leave it out")
        if self.shape.metric is not None and self.shape.metric.kind == "choice":
            for task in filter(None, (self.task, self.task.valid)):
                demand_choices(task.examples, file=task.file.name)
        return None

    def absent(self) -> list[Adapter]:
        """The adapters whose weights would have to be downloaded."""
        return self.pool.absent(self.names)

    def work(self, adapters: int) -> tuple[Recipe, int]:
        """The recipe of a descent that takes as long as this fit, and how often fp32 copies of the factors are held."""
        way: Learning = FIT_METHODS.load(self.shape.preset)(adapters, **self.shape.knobs)
        # Trained factors have gradients, two moments and the best values beside them.
        copies = 5 if way.parameters.trained else 0
        if way.search is None:
            return self.recipe, copies
        # An evaluation goes forward over all training examples, a step of a descent forward and back over its batch.
        # The work of a command is not known.
        tried, batch = way.search.evaluations, 1 if self.command else math.ceil(self.task.learnt / 2)
        return replace(self.recipe, steps=tried, every=tried, batch=batch), copies

    def ref(self, prompting: Prompting | None = None) -> BaseRef:
        """The base model, pinned."""
        settings = self.settings
        return pin(
            self.base,
            device=settings.device,
            dtype=settings.dtype,
            prompting=prompting or Prompting(),
            progress=self.pool.progress,
        )

    def prepare(self, prompting: Prompting | None = None, *, out: Path | None = None) -> FitJob:
        """Open the adapters, downloading missing files, and check everything that needs no weights."""
        settings, ref = self.settings, self.ref(prompting)
        gathered = self.pool.adapters(self.names, passed_on=True)
        target = "" if self.options.target is None else gathered.adapters[-1].ref.pinned
        # A merge computes in float64, which Apple's GPUs do not have.
        device = ref.device if ref.device.startswith("cuda") else "cpu"
        planned = plan(
            gathered.adapters,
            [1.0] * len(gathered.adapters),
            replace(self.merging, device=device),
            base=gathered.base,
            skeleton=gathered.skeleton,
            terms=gathered.terms,
        )
        ref = dataclasses.replace(ref, name=gathered.base)
        described = run_settings(
            planned,
            shape=self.shape,
            recipe=self.recipe,
            target=target,
            controls=self.options.controls,
            seeds=self.options.seeds,
            data=self.task.settings,
        )
        job = Job(
            verb="fit",
            settings=ref.settings | described,
            inputs={**ref.inputs, **gathered.inputs, **self.task.inputs},
            runs=settings.runs,
            out=out,
            device=ref.device,
        )
        return FitJob(request=self, plan=planned, job=job, ref=ref, target=target, notice=gathered.notice)
