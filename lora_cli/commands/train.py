"""`lora train`: a new LoRA on the same data, the baseline that a fit has to beat."""

from typing import TYPE_CHECKING, Annotated, Any

import typer
from msgspec.structs import replace

from lora_cli.adapters.targets import ALL_LINEAR
from lora_cli.commands.options import (
    Command,
    JobOptions,
    OnTask,
    Prompts,
    base_of,
    examples,
    screen_for,
    show_output,
    with_flags,
)
from lora_cli.commands.task import tell
from lora_cli.options import Flag, Options
from lora_cli.recipes import TargetRecipe
from lora_cli.screen import near
from lora_cli.task import load_task, task_sha256

if TYPE_CHECKING:
    from lora_cli.runs import Run
    from lora_cli.steps.train import TrainResult

LORA = "The LoRA"


class TrainOptions(Options, frozen=True, kw_only=True):
    """The LoRA that is trained."""

    rank: Annotated[int, Flag(help="Rank of the LoRA.", panel=LORA)] = 64
    alpha: Annotated[float, Flag(help="Alpha; the update is scaled by alpha/rank.", panel=LORA)] = 16.0
    dropout: Annotated[float, Flag(help="Dropout on the LoRA's input.", panel=LORA)] = 0.1
    target_modules: Annotated[str, Flag(help="Names of modules with commas, or all-linear.", panel=LORA)] = ALL_LINEAR

    @property
    def shape(self) -> dict[str, Any]:
        """The options as `steps.train` takes them."""
        names = [part.strip() for part in self.target_modules.split(",") if part.strip()]
        modules = ALL_LINEAR if self.target_modules == ALL_LINEAR else names
        return {"rank": self.rank, "alpha": self.alpha, "dropout": self.dropout, "target_modules": modules}


def train(
    *,
    setup: OnTask,
    options: TrainOptions,
    recipe: TargetRecipe,
    job: JobOptions,
    prompts: Prompts,
) -> None:
    """Train a new LoRA on a task: the baseline that every fit has to beat.

    80 % of the examples train it, the others choose the best step. The result is a PEFT folder with run.json; its path
    goes to stdout.
    """
    screen, settings = screen_for(job.json), setup.load()
    file, model = setup.task(settings), base_of(settings)
    task, sha256 = load_task(file), task_sha256(file)

    from lora_cli.adapters.base_names import public_base
    from lora_cli.base_model import pin
    from lora_cli.steps import train as step
    from lora_cli.steps.recorded import Job, run_once
    from lora_cli.steps.task_view import look

    recipe = replace(recipe, seed=settings.seed)
    described = step.asked(recipe=recipe, data=file.name, **options.shape)
    ref = pin(
        model,
        name=public_base(model, settings.base_aliases),
        device=settings.device,
        dtype=settings.dtype,
        prompting=prompts.prompting(),
    )
    training = Job(
        verb="train",
        settings=ref.settings | described,
        inputs={**ref.inputs, file.name: sha256},
        runs=settings.runs,
        out=job.out,
        device=ref.device,
    )
    if job.dry_run:
        matrices = _chosen(ref.place, options)
        found = {"out": str(training.folder), **training.settings, "matrices": matrices}
        screen.document("lora.train.plan/1", found)
        return

    def work(run: "Run") -> "TrainResult":
        screen.say(f"train: {len(task)} examples of {file.name}, split 80/20 by seed {settings.seed}; base {model}")
        loaded = ref.load()
        tell(screen, look(task, loaded.encoder, seed=settings.seed))
        return step.train_and_write(
            loaded, task, training.folder, run, replace=job.force, progress=progress, recipe=recipe, **options.shape
        )

    with screen.progress() as progress:
        done = run_once(settings.db, training, work, force=job.force)
    show_output(screen, "lora.train/1", training.folder, done.run.record())
    if done.report is None:
        screen.say(f"train: {near(training.folder)} is up to date")
        return
    screen.say(outcome(done.report, options.rank))
    if done.report.adapted:
        screen.say(f"  {done.report.adapted}")


def outcome(result: "TrainResult", rank: int) -> str:
    """The one line that says what a training did."""
    learnt = result.learnt
    return (
        f"train: validation loss {learnt.loss_before:.3f} → {learnt.loss_after:.3f} · rank {rank} · "
        f"{result.parameters:,} parameters · best at step {learnt.best_step} of {learnt.curve[-1].step}"
    )


def _chosen(base: str, options: TrainOptions) -> str | None:
    """Which matrices of the base are adapted and which not, where that does not go without saying."""
    from lora_cli.models.new_adapter import choose
    from lora_cli.steps.bases import config_here, skeleton_at

    folder = config_here(base)
    skeleton = skeleton_at(folder) if folder is not None else None
    if skeleton is None:
        return None
    return choose(skeleton, options.shape["target_modules"], options.dropout).said or None


def register(root: typer.Typer) -> None:
    """Add `lora train` to the command tree."""
    root.command(
        cls=Command,
        epilog=examples(
            "lora train --data task.jsonl --rank 8 --steps 40 --lr 5e-3",
            "lora train --data task.jsonl --target-modules q_proj,v_proj --dry-run",
        ),
    )(with_flags(train))
