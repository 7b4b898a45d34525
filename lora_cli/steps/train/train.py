"""Train a new LoRA on a task: the baseline that every fit has to beat."""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_cli.formats.base_names import split_revision
from lora_cli.formats.card import write_card
from lora_cli.formats.kinds import WEIGHTS_NAME
from lora_cli.formats.run_record import Run
from lora_cli.hashes import sha256_of
from lora_cli.models.base_model import BaseModel
from lora_cli.outputs import whole_folder
from lora_cli.recipes import Recipe, TargetRecipe, TrainOptions
from lora_cli.records import Example, Progress, silent
from lora_cli.steps.pool.gather import opened_folder
from lora_cli.steps.train.batch import within
from lora_cli.steps.train.descent import TRACE_FILE, Checkpoint, Learnt, Parts, learn, write_trace
from lora_cli.task import HeldOut, Task
from lora_cli.text import counted


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """The result of a training; the LoRA's files are in the folder given to `train`.

    `adapted` lists the matrices of the base that the LoRA adapts and those that it does not, "" for the usual ones.
    """

    learnt: Learnt
    adapted: str
    parameters: int
    n_train: int
    n_validation: int


def train(
    base: BaseModel,
    examples: Sequence[Example],
    folder: Path,
    *,
    options: TrainOptions | None = None,
    recipe: Recipe | None = None,
    held: HeldOut | None = None,
    checkpoint: Checkpoint | None = None,
    progress: Progress = silent,
) -> TrainResult:
    """Train a LoRA on 80 % of the examples, keep the best step by loss on those held out, and save it into `folder`.

    `folder` must be empty (`outputs.whole_folder` makes one); the two PEFT files go into it.

    Args:
        options: the LoRA, fresh or the one to go on from; `models.new_adapter.choose` finds its target modules.
        recipe: the paper's, unless given.
        held: the examples that choose the best step, a share of these unless given.
        checkpoint: see `learn`.

    Raises:
        Refused: a LoRA of another form to go on from, modules that this base lacks, or a loss that is not finite.
        DataError: the examples cannot be split, or one is too long.
    """
    options, recipe = options or TrainOptions(), recipe or TargetRecipe()
    parts = Parts.of(base.encode_all, examples, held=held or HeldOut(), seed=recipe.seed)
    recipe = within(recipe, len(parts.training))
    with base.new_adapter(**options.shape, seed=recipe.seed) as adapter:
        if options.start is not None:
            adapter.start_from(opened_folder(options.start))
        parameters = adapter.parameters
        learnt = learn(
            base,
            parameters,
            parts,
            recipe,
            while_training=adapter.dropout,
            checkpoint=checkpoint,
            progress=functools.partial(progress, "train: new LoRA"),
        )
        adapter.save(folder)
    return TrainResult(
        learnt=learnt,
        adapted=adapter.chosen.said,
        parameters=sum(parameter.numel() for parameter in parameters),
        n_train=len(parts.training),
        n_validation=len(parts.validation),
    )


def run_settings(*, options: TrainOptions, recipe: Recipe, data: Mapping[str, str]) -> dict[str, Any]:
    """The settings of a run that trains, beside those of the base. `data` are the names of its files."""
    return {**options.shape, **recipe.settings, **data}


def train_and_write(
    base: BaseModel,
    task: Task,
    folder: Path,
    run: Run,
    *,
    options: TrainOptions,
    recipe: Recipe,
    replace: bool = False,
    progress: Progress = silent,
) -> TrainResult:
    """Train, and write adapter, model card and run.json as one folder, whole or absent.

    Raises:
        OutputError: `folder` exists (and `replace` is false) or cannot be written. Also the errors of `train`.
    """
    with whole_folder(folder, replace=replace) as partial:
        result = train(base, task.examples, partial, options=options, recipe=recipe, held=task.held, progress=progress)
        run.outputs[WEIGHTS_NAME] = sha256_of(partial / WEIGHTS_NAME)
        run.outputs[TRACE_FILE] = write_trace(result.learnt, partial)
        run.results.update(
            loss_before=result.learnt.loss_before,
            loss=result.learnt.loss_after,
            best_step=result.learnt.best_step,
            parameters=result.parameters,
            n_train=result.n_train,
            n_validation=result.n_validation,
            curve=[asdict(point) for point in result.learnt.curve],
            card=write_card(partial, _card(base.name, result)),
        )
        run.write(partial)
    return result


def _card(base: str, result: TrainResult) -> str:
    name, revision = split_revision(base)
    named = f"`{name}`" + (f" at revision `{revision}`" if revision else "")
    front = {"base_model": name, "library_name": "peft", "tags": ["lora", f"base_model:adapter:{name}"]}
    learnt = result.learnt
    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in front.items()),
        "---",
        "",
        "# LoRA",
        "",
        f"A LoRA of {named} trained on {counted(result.n_train, 'example')}. "
        f"Validation loss on {counted(result.n_validation, 'other')}: "
        f"{learnt.loss_before:.3f} before, {learnt.loss_after:.3f} after, best at step {learnt.best_step}.",
        "",
        "`run.json` holds the settings, versions and hashes that made this folder.",
        "",
    ]
    return "\n".join(lines)
