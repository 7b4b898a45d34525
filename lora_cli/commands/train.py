"""`lora train`: a new LoRA on the same data, the baseline that a fit has to beat."""

from typing import TYPE_CHECKING

import typer

from lora_cli.commands.learning import Validation
from lora_cli.commands.options import (
    Command,
    JobOptions,
    OnTask,
    Prompts,
    examples,
    show_output,
    show_plan,
    with_flags,
)
from lora_cli.recipes import TargetRecipe, TrainOptions
from lora_cli.screen import near
from lora_cli.settings import base_of

if TYPE_CHECKING:
    from lora_cli.steps.train.train import TrainResult


def train(
    *,
    setup: OnTask,
    held: Validation,
    options: TrainOptions,
    recipe: TargetRecipe,
    job: JobOptions,
    prompts: Prompts,
) -> None:
    """Train a new LoRA on a task: the baseline that every fit has to beat.

    80 % of the examples train it; the others, or those of --valid, choose the best step. The result is a PEFT folder
    with run.json; its path goes to stdout.
    """
    screen, settings, prompting = job.screen(), setup.load(), prompts.prompting()
    # Report a missing base or a faulty task before importing libraries, which takes seconds.
    base_of(settings)
    task = setup.task(settings, valid=held.valid)

    from lora_cli.steps.estimate import of_train
    from lora_cli.steps.train.request import train_job

    with screen.progress() as progress:
        training = train_job(
            task,
            settings,
            options=options,
            recipe=recipe,
            prompting=prompting,
            out=job.out,
            announce=screen.say,
            progress=progress,
        )
        folder = training.job.folder
        if job.dry_run:
            found = {"out": str(folder), **training.job.settings, "matrices": training.matrices}
            show_plan(screen, "lora.train.plan/1", found, of_train(training))
            return
        done = training.run(settings.db, force=job.force, progress=progress)
    show_output(screen, "lora.train/1", folder, done.run.record())
    if done.report is None:
        screen.say(f"train: {near(folder)} is up to date")
        return
    screen.say(outcome(done.report, options.rank))
    if done.report.adapted:
        screen.say(f"  {done.report.adapted}")


def outcome(result: "TrainResult", rank: int) -> str:
    """The one-line summary of a training."""
    learnt = result.learnt
    return (
        f"train: validation loss {learnt.loss_before:.3f} → {learnt.loss_after:.3f} · rank {rank} · "
        f"{result.parameters:,} parameters · best at step {learnt.best_step} of {learnt.curve[-1].step}"
    )


def register(root: typer.Typer) -> None:
    """Add `lora train` to the command tree."""
    root.command(
        cls=Command,
        epilog=examples(
            "lora train --data task.jsonl --rank 8 --steps 40 --lr 5e-3",
            "lora train --data task.jsonl --target-modules q_proj,v_proj --dry-run",
        ),
    )(with_flags(train))
