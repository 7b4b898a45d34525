"""What a fit is compared with: the base, the same fit over noise, a new LoRA; and the same by other seeds."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_cli.formats.reader import OpenAdapter
from lora_cli.models.base_model import BaseModel
from lora_cli.recipes import TargetRecipe, TrainOptions
from lora_cli.records import Example, Progress
from lora_cli.scores import Difference, paired_difference
from lora_cli.steps.fit.fit import NOISES, FitResult, Fitting, fit
from lora_cli.steps.train.descent import Checkpoint, Learnt, identity, losses
from lora_cli.steps.train.train import train


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A fit compared with something else on the same validation examples.

    `loss` is the other's; `difference` is the fit's loss minus the other's, per example: below 0 the fit is better.
    """

    against: str
    loss: float
    difference: Difference

    @property
    def gain(self) -> bool:
        """Whether interval and p support that the fit is better."""
        return self.difference.measurable and self.difference.delta < 0

    @property
    def worse(self) -> bool:
        """Whether interval and p support that the fit is worse."""
        return self.difference.measurable and self.difference.delta > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A fit and its comparisons by one seed, the base's first. `stopped` is where a time limit came, "" if nowhere."""

    seed: int
    result: FitResult
    comparisons: tuple[Comparison, ...]
    stopped: str


def compared(
    base: BaseModel,
    adapters: Sequence[OpenAdapter],
    examples: Sequence[Example],
    how: Fitting,
    result: FitResult,
    state: Callable[[str], Path],
    *,
    progress: Progress,
) -> Trial:
    """`result`, the fit of these adapters, beside its controls, which learn by the same seed.

    Args:
        state: the file in which the training of a control, by name, keeps its state.
    """
    seed, ours = how.recipe.seed, result.learnt.each_after
    others = {"base": losses(base, how.parts(base, examples).validation, result.goal)}
    stopped = "" if result.learnt.finished else _place("the fit", seed, result.learnt)
    for name in how.controls:
        if stopped or name in others:
            continue
        if name in NOISES:
            noise = NOISES[name]
            own = fit(base, adapters, examples, how, reinit=noise, checkpoint=state(name), progress=progress).learnt
        else:
            own = _new_lora(base, examples, how, state(name), progress)
        if own.finished:
            others[name] = own.loss_after, list(own.each_after)
        else:
            stopped = _place(f"the control {name}", seed, own)
    comparisons = tuple(
        Comparison(against=name, loss=loss, difference=paired_difference(ours, each, seed=seed))
        for name, (loss, each) in others.items()
    )
    return Trial(seed=seed, result=result, comparisons=comparisons, stopped=stopped)


def _new_lora(base: BaseModel, examples: Sequence[Example], how: Fitting, state: Path, progress: Progress) -> Learnt:
    """What a new LoRA learns from the same examples by the paper's recipe; its weights are not kept."""
    recipe = TargetRecipe(seed=how.recipe.seed)
    key = identity(base, examples, "target", TrainOptions().shape, recipe.settings, how.held.settings)
    checkpoint = Checkpoint(state, key, how.deadline)
    with tempfile.TemporaryDirectory() as scratch:
        return train(
            base,
            examples,
            Path(scratch),
            recipe=recipe,
            held=how.held,
            checkpoint=checkpoint,
            progress=progress,
        ).learnt


def _place(what: str, seed: int, learnt: Learnt) -> str:
    return f"{what} of seed {seed} at step {len(learnt.trace)} of {learnt.steps}"
