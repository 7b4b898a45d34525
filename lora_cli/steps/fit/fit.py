"""Fit coefficients to a task: the family of arXiv 2602.12323 by its presets, and the random-weight control."""

import functools
import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_cli.algebra.lowrank import LowRank
from lora_cli.errors import NothingMatched, UsageError
from lora_cli.fit_methods import Learning, Measure
from lora_cli.formats.reader import OpenAdapter
from lora_cli.models.base_model import BaseModel
from lora_cli.models.mixture import Mixture
from lora_cli.models.noise import Noise
from lora_cli.recipes import FIT_METHODS, Recipe, Shape
from lora_cli.records import Coefficients, Example, Progress, silent
from lora_cli.steps.fit.search import search
from lora_cli.steps.merge.stream import MergePlan
from lora_cli.steps.train.descent import Checkpoint, Goal, Learnt, Parts, identity, learn
from lora_cli.task import HeldOut

NOISES: Mapping[str, Noise] = {"random": "norm", "random-pooled": "pooled"}
"""The controls that fit noise, and the noise of each."""
CONTROLS = (*NOISES, "target", "base")


@dataclass(frozen=True, slots=True, kw_only=True)
class FitResult:
    """Coefficients and how they were found. `n_train` and `n_validation` count the two parts of the data.

    `updates` is the fitted mixture itself, one exact update per module (of noise, where the fit was over noise).
    `trained` holds each adapter's factors by module, where the fit trained them. `measure` names what the losses are,
    `kept` the step whose parameters they belong to.
    """

    coefficients: Coefficients
    updates: Mapping[str, LowRank] = field(repr=False)
    trained: Sequence[Mapping[str, LowRank]] = field(repr=False, default=())
    measure: Measure
    kept: str
    learnt: Learnt
    n_train: int
    n_validation: int

    @property
    def goal(self) -> Goal:
        """What its losses are losses of, without a penalty."""
        return Goal(measure=_MEASURES[self.measure])


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitting:
    """How coefficients are learnt.

    shape: the preset, and its knobs that are turned; default `adaptive` as it is.
    recipe: default 100 steps of 8 examples at the preset's learning rate.
    held: the examples held out to choose the best step.
    target: `id@commit` of the adapter that was trained on the task itself, if there is one; it joins in front of the
        others.
    controls: of `NOISES`, the same fit over noise; "target", a new LoRA trained on the same data; "base", which is
        always compared.
    task_sha256: SHA-256 of the task's file, which the coefficients name.
    seeds: the number of fits, each with its controls, by the seed of the recipe and those that follow.
    recompute: layers are computed again for their gradients, and their values are not kept.
    deadline: on the clock of `time.monotonic`: a training stops at its next step, and its state is kept.

    Raises UsageError for an unknown control, or one that the preset has no use for.
    """

    shape: Shape = field(default_factory=Shape)
    recipe: Recipe = field(default_factory=Recipe)
    held: HeldOut = field(default_factory=HeldOut)
    target: str = ""
    controls: Sequence[str] = ()
    task_sha256: str = ""
    seeds: int = 1
    recompute: bool = False
    deadline: float = math.inf

    def __post_init__(self) -> None:
        demand_sane(self.shape, self.controls)

    def parts(self, base: BaseModel, examples: Sequence[Example]) -> Parts:
        """The examples split and encoded, or only their prompts, if the fit learns from no answers."""
        encode = base.encode_all if self.shape.labelled else base.encoder.prompts_of
        return Parts.of(encode, examples, held=self.held, seed=self.recipe.seed)


def fit(
    base: BaseModel,
    adapters: Sequence[OpenAdapter],
    examples: Sequence[Example],
    how: Fitting | None = None,
    *,
    reinit: Noise | None = None,
    checkpoint: Path | None = None,
    progress: Progress = silent,
) -> FitResult:
    """Fit coefficients as `how.shape` says on 80 % of the examples, and measure them on those held out.

    Args:
        reinit: the control: noise in place of every adapter's factors, the target's excepted.
        checkpoint: see `learn`.

    Raises:
        NothingMatched: no adapters. Refused: an adapter does not fit, or the loss is not finite.
        DataError: the examples cannot be split, or one is too long. UsageError: settings out of range.
    """
    how = how or Fitting()
    shape, recipe = how.shape, how.shape.completed(how.recipe)
    if not adapters:
        raise NothingMatched("no adapters to fit", hint="choose some with 'lora select' or name them")
    together = sorted(adapters, key=lambda adapter: adapter.ref.pinned != how.target)
    parts = how.parts(base, examples)
    kept = 1 if together[0].ref.pinned == how.target else 0
    learning: Learning = FIT_METHODS.load(shape.preset)(len(together), **shape.knobs)
    mixture = Mixture(
        base, together, learning.parameters, seed=recipe.seed, reinit=reinit, kept=kept, progress=progress
    )
    state = None
    if checkpoint is not None:
        key = identity(
            base, examples, mixture.adapters, shape.settings, recipe.settings, how.held.settings, kept, reinit
        )
        state = Checkpoint(checkpoint, key, how.deadline)
    told = functools.partial(progress, f"fit: noise, {reinit}" if reinit else "fit: adapters")
    with mixture.applied(base):
        if learning.search is not None:
            learnt = search(base, mixture, parts, learning, seed=recipe.seed, progress=told)
        else:
            goal = goal_of(learning, mixture, recipe)
            learnt = learn(base, mixture.learnt, parts, recipe, goal=goal, checkpoint=state, progress=told)
    coefficients = Coefficients(
        adapters=mixture.adapters,
        values=mixture.values(),
        granularity=learning.parameters.granularity,
        activation=learning.parameters.activation,
        task_sha256=how.task_sha256,
        base=base.name,
        trained=learning.parameters.trained,
    )
    return FitResult(
        coefficients=coefficients,
        updates=mixture.updates(),
        trained=mixture.factors() if learning.parameters.trained else (),
        measure=learning.measure,
        kept=learning.told(learnt.best_step),
        learnt=learnt,
        n_train=len(parts.training),
        n_validation=len(parts.validation),
    )


_MEASURES = {"loss": BaseModel.completion_losses, "entropy": BaseModel.completion_entropies}


def goal_of(learning: Learning, mixture: Mixture, recipe: Recipe) -> Goal:
    """What a descent minimises at one point of the family, and which parameters it keeps."""
    l1 = learning.l1 * (recipe.batch if learning.l1_per_example else 1)
    return Goal(
        measure=_MEASURES[learning.measure],
        penalty=(lambda: l1 * mixture.penalty()) if l1 else None,
        last=learning.kept == "last",
    )


def run_settings(
    plan: MergePlan,
    *,
    shape: Shape,
    recipe: Recipe,
    target: str = "",
    controls: Sequence[str] = (),
    seeds: int = 1,
    data: Mapping[str, str],
) -> dict[str, Any]:
    """The settings of a run that fits, beside those of the base. `data` are the names of the task's files."""
    reduction = {"rank": plan.options.rank, "energy": plan.options.energy}
    if FIT_METHODS.get(shape.preset).kind == "search":
        found = {"seed": recipe.seed, "cma": importlib.metadata.version("cma")}
    else:
        found = shape.completed(recipe).settings
    learning = {**shape.settings, **found, "target": target}
    return {**learning, "controls": list(controls), "seeds": seeds, **reduction, **data}


def demand_sane(shape: Shape, controls: Sequence[str] = ()) -> None:
    """UsageError for an unknown control, a new LoRA beside a fit without answers, or a preset that fits nothing."""
    if shape.routes:
        raise UsageError(f"{shape.preset} makes a router and fits nothing", hint="use steps.fit.route")
    if "target" in controls and not shape.labelled:
        raise UsageError(
            "--control target trains on answers, which --objective entropy does not read", hint="leave it out"
        )
    for control in controls:
        if control not in CONTROLS:
            raise UsageError(f"unknown control {control!r}", hint=f"one of {', '.join(CONTROLS)}")
