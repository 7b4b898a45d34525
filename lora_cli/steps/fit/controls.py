"""What a fit is compared with: the base, the same fit over noise, a new LoRA; and the same by other seeds."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from lora_cli.formats.reader import OpenAdapter
from lora_cli.models.base_model import BaseModel
from lora_cli.recipes import TargetRecipe, TrainOptions
from lora_cli.records import Example, Progress
from lora_cli.scores import Difference, paired_difference
from lora_cli.steps.fit.fit import NOISES, FitResult, Fitting, fit
from lora_cli.steps.fit.objective import Judged
from lora_cli.steps.train.descent import Checkpoint, Learnt, identity, losses
from lora_cli.steps.train.train import train


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A fit compared with something else on the same validation examples.

    `loss` is the other's; `difference` is the fit's loss minus the other's, per example: below 0 the fit is better.
    `objective` compares by the objective of a search.
    """

    against: str
    loss: float
    difference: Difference
    objective: "ByObjective | None" = None

    @property
    def gain(self) -> bool:
        """Whether interval and p support that the fit is better, by its objective if it has one."""
        return self._measurable(-1)

    @property
    def worse(self) -> bool:
        """Whether interval and p support that the fit is worse."""
        return self._measurable(1)

    def _measurable(self, sign: int) -> bool:
        """Whether a difference of this sign, with which a loss rises, is measurable."""
        difference = self.difference if self.objective is None else self.objective.difference
        if self.objective is not None and self.objective.better == "higher":
            sign = -sign
        return difference is not None and difference.measurable and sign * difference.delta > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ByObjective:
    """The value of another system by a fit's objective, and the fit's values minus its on the examples held out.

    A command gives one number, so there is no difference by example, and None.
    """

    name: str
    better: str
    value: float
    difference: Difference | None


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
    seed, ours, judged = how.recipe.seed, result.learnt.each_after, result.judged
    others = {"base": losses(base, how.parts(base, examples).validation, result.goal)}
    values = {} if judged is None else {"base": (judged.training[0], judged.before)}
    stopped = "" if result.learnt.finished else _place("the fit", seed, result.learnt)
    for name in how.controls:
        if stopped or name in others:
            continue
        if name in NOISES:
            noise = NOISES[name]
            control = fit(base, adapters, examples, how, reinit=noise, checkpoint=state(name), progress=progress)
            own = control.learnt
            if control.judged is not None:
                values[name] = control.judged.training[1], control.judged.after
        else:
            with tempfile.TemporaryDirectory() as scratch:
                own = _new_lora(base, examples, how, Path(scratch), state(name), progress)
                if judged is not None and own.finished:
                    values[name] = judged.of_folder(Path(scratch))
        if own.finished:
            others[name] = own.loss_after, list(own.each_after)
        else:
            stopped = _place(f"the control {name}", seed, own)
    comparisons = tuple(
        Comparison(
            against=name,
            loss=loss,
            difference=paired_difference(ours, each, seed=seed),
            objective=None if judged is None else _by_objective(judged, *values[name], seed),
        )
        for name, (loss, each) in others.items()
    )
    return Trial(seed=seed, result=result, comparisons=comparisons, stopped=stopped)


def _by_objective(judged: Judged, value: float, each: Sequence[float], seed: int) -> ByObjective:
    """A system with this value and these of the examples held out, beside the fit."""
    if not each:
        return ByObjective(name=judged.name, better=judged.better, value=value, difference=None)
    return ByObjective(
        name=judged.name,
        better=judged.better,
        value=fmean(each),
        difference=paired_difference(judged.after, each, seed=seed),
    )


def _new_lora(
    base: BaseModel, examples: Sequence[Example], how: Fitting, folder: Path, state: Path, progress: Progress
) -> Learnt:
    """What a new LoRA in `folder` learns from the same examples by the paper's recipe."""
    recipe = TargetRecipe(seed=how.recipe.seed)
    key = identity(base, examples, "target", TrainOptions().shape, recipe.settings, how.held.settings)
    checkpoint = Checkpoint(state, key, how.deadline)
    return train(
        base,
        examples,
        folder,
        recipe=recipe,
        held=how.held,
        checkpoint=checkpoint,
        progress=progress,
    ).learnt


def _place(what: str, seed: int, learnt: Learnt) -> str:
    return f"{what} of seed {seed} at {learnt.place}"
