"""`lora train`: a new LoRA on the same data, the baseline that a fit has to beat."""

from typing import Annotated, Any

import typer

from lora_cli.commands.fit import Data, base_of, task_file
from lora_cli.commands.options import (
    Base,
    Db,
    Device,
    DryRun,
    Dtype,
    Force,
    Json,
    Out,
    Seed,
    examples,
    screen_for,
    show_output,
    with_prompting,
)
from lora_cli.commands.task import summary
from lora_cli.models.encode import Prompting
from lora_cli.screen import near
from lora_cli.settings import load
from lora_cli.task import load_task, task_sha256


def train(
    data: Data = None,
    rank: Annotated[int, typer.Option("--rank", help="Rank of the LoRA.")] = 64,
    alpha: Annotated[float, typer.Option("--alpha", help="Alpha; the update is scaled by alpha/rank.")] = 16.0,
    dropout: Annotated[float, typer.Option("--dropout", help="Dropout on the LoRA's input.")] = 0.1,
    target_modules: Annotated[
        str, typer.Option("--target-modules", help="Names of modules with commas, or all-linear.")
    ] = "all-linear",
    steps: Annotated[int, typer.Option("--steps", help="Steps of the optimiser.")] = 400,
    lr: Annotated[float, typer.Option("--lr", help="Peak learning rate.")] = 3e-4,
    batch: Annotated[int, typer.Option("--batch", help="Examples per step.")] = 8,
    base: Base = None,
    device: Device = None,
    dtype: Dtype = None,
    seed: Seed = None,
    out: Out = None,
    force: Force = False,
    dry_run: DryRun = False,
    db: Db = None,
    json: Json = False,
    *,
    prompting: Prompting,
) -> None:
    """Train a new LoRA on a task: the baseline that every fit has to beat.

    80 % of the examples train it, the others choose the best step. The result is a PEFT folder with run.json; its path
    goes to stdout.
    """
    screen = screen_for(json)
    settings = load({"base": base, "data": data, "device": device, "dtype": dtype, "seed": seed, "db": db})
    file, model = task_file(settings), base_of(settings)
    task, sha256 = load_task(file), task_sha256(file)

    from lora_cli import runs
    from lora_cli.adapters.base_names import public_base
    from lora_cli.base_model import pin
    from lora_cli.steps import train as step
    from lora_cli.steps.descent import Recipe
    from lora_cli.steps.task_view import look

    shape: dict[str, Any] = {
        "rank": rank,
        "alpha": alpha,
        "dropout": dropout,
        "target_modules": _modules(target_modules),
    }
    recipe = Recipe(steps=steps, lr=lr, batch=batch, seed=settings.seed)
    described = step.asked(recipe=recipe, data=file.name, **shape)
    name = public_base(model, settings.base_aliases)
    ref = pin(model, name=name, device=settings.device, dtype=settings.dtype, prompting=prompting)
    asked, inputs = ref.settings | described, {**ref.inputs, file.name: sha256}
    key = runs.key_of("train", asked, inputs)
    folder = out or settings.runs / f"train-{key[:8]}"
    if dry_run:
        screen.document("lora.train.plan/1", {"out": str(folder), **asked, "matrices": _chosen(ref.place, shape)})
        return
    done = runs.claim(folder, key, force=force)
    if not done:
        screen.say(f"train: {len(task)} examples of {file.name}, split 80/20 by seed {settings.seed}; base {model}")
    with screen.progress() as progress, runs.recorded(settings.db, "train", asked, inputs, folder) as run:
        if done:
            run.take(folder)
            told = [f"train: {near(folder)} is up to date"]
        else:
            run.device = ref.device
            loaded = ref.load()
            screen.say(summary(look(task, loaded.encoder, seed=settings.seed)))
            result = step.train_and_write(
                loaded, task, folder, run, replace=force, progress=progress, recipe=recipe, **shape
            )
            told = [outcome(result, rank), *([f"  {result.adapted}"] if result.adapted else [])]
    show_output(screen, "lora.train/1", folder, run.record())
    for line in told:
        screen.say(line)


def outcome(result: Any, rank: int) -> str:
    """The one line that says what a training did."""
    learnt = result.learnt
    return (
        f"train: validation loss {learnt.loss_before:.3f} → {learnt.loss_after:.3f} · rank {rank} · "
        f"{result.parameters:,} parameters · best at step {learnt.best_step} of {learnt.curve[-1].step}"
    )


def _chosen(base: str, shape: dict[str, Any]) -> str | None:
    """Which matrices of the base are adapted and which not, where that does not go without saying."""
    from lora_cli.models.new_adapter import choose
    from lora_cli.steps.bases import config_here, skeleton_at

    folder = config_here(base)
    skeleton = skeleton_at(folder) if folder is not None else None
    return choose(skeleton, shape["target_modules"], shape["dropout"]).said or None if skeleton is not None else None


def _modules(text: str) -> str | list[str]:
    return text if text == "all-linear" else [part.strip() for part in text.split(",") if part.strip()]


def register(root: typer.Typer) -> None:
    """Add `lora train` to the command tree."""
    root.command(
        epilog=examples(
            "lora train --data task.jsonl --rank 8 --steps 40 --lr 5e-3",
            "lora train --data task.jsonl --target-modules q_proj,v_proj --dry-run",
        )
    )(with_prompting(train))
