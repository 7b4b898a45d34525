"""From the user's request for a training to a job that is ready to run."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from lora_cli.formats.base_names import public_base
from lora_cli.formats.run_record import Run
from lora_cli.hashes import sha256_of
from lora_cli.models.forms import Prompting
from lora_cli.models.new_adapter import choose
from lora_cli.models.ref import BaseRef, pin
from lora_cli.recipes import Recipe, TargetRecipe, TrainOptions
from lora_cli.records import Progress, silent
from lora_cli.settings import Settings, base_of
from lora_cli.steps.bases import config_here, skeleton_at
from lora_cli.steps.pool.gather import opened_folder
from lora_cli.steps.recorded import Finished, Job, run_once
from lora_cli.steps.task_view import look, summary_of
from lora_cli.steps.train.batch import batch_note, within
from lora_cli.steps.train.train import TrainResult, run_settings, train_and_write
from lora_cli.task import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainJob:
    """A planned training of a LoRA with `options` on `task`.

    `base` is its base model as the user named it. `asked` is the user's recipe, and `recipe` takes no
    more examples a step than there are.
    """

    job: Job
    ref: BaseRef
    base: str
    task: Task
    options: TrainOptions
    recipe: Recipe
    asked: Recipe
    announce: Callable[[str], None]

    @property
    def matrices(self) -> str | None:
        """The matrices of the base that are adapted and those that are not, "" for the usual ones."""
        folder = config_here(self.ref.place)
        skeleton = skeleton_at(folder) if folder is not None else None
        if skeleton is None:
            return None
        return choose(skeleton, self.options.shape["target_modules"], self.options.dropout).said or None

    def run(self, db: Path, *, force: bool = False, progress: Progress = silent) -> Finished[TrainResult]:
        """Train, unless the result is there; see `run_once` and `steps.train.train_and_write`."""

        def work(run: Run) -> TrainResult:
            task, seed = self.task, self.recipe.seed
            self.announce(f"train: {task.parts_in_words(seed)}; base {self.base}")
            for line in batch_note(self.asked, self.recipe):
                self.announce(line)
            loaded = self.ref.load(progress)
            for line in summary_of(look(task.examples, loaded.encoder, seed=seed, held=task.held)):
                self.announce(line)
            return train_and_write(
                loaded,
                task,
                self.job.folder,
                run,
                options=self.options,
                recipe=self.recipe,
                replace=force,
                progress=progress,
            )

        return run_once(db, self.job, work, force=force, progress=progress)


def train_job(
    task: Task,
    settings: Settings,
    *,
    options: TrainOptions | None = None,
    recipe: Recipe | None = None,
    prompting: Prompting | None = None,
    out: Path | None = None,
    announce: Callable[[str], None],
    progress: Progress = silent,
) -> TrainJob:
    """The training of a new LoRA on `task`, checked as far as that needs no weights.

    Raises:
        UsageError: no base model.
        DataError: a task of one example.
        NothingMatched, Refused: no adapter in the folder to go on from, or one that cannot be used.
    """
    task.held.demand_parts(task.examples)
    options, asked = options or TrainOptions(), replace(recipe or TargetRecipe(), seed=settings.seed)
    recipe = within(asked, task.learnt)
    described = run_settings(options=options, recipe=recipe, data=task.settings)
    base = base_of(settings)
    ref = pin(
        base,
        name=public_base(base, settings.base_aliases),
        device=settings.device,
        dtype=settings.dtype,
        prompting=prompting or Prompting(),
        progress=progress,
    )
    start = None if options.start is None else opened_folder(options.start)
    job = Job(
        verb="train",
        settings=ref.settings | described,
        inputs={
            **ref.inputs,
            **task.inputs,
            **({} if start is None else {start.ref.pinned: sha256_of(start.files.weights)}),
        },
        runs=settings.runs,
        out=out,
        device=ref.device,
    )
    return TrainJob(
        job=job, ref=ref, base=base, task=task, options=options, recipe=recipe, asked=asked, announce=announce
    )
