"""Fit coefficients to a task: the family of arXiv 2602.12323 by its presets, and the random-weight control."""

import functools
import importlib.metadata
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_cli.algebra.lowrank import LowRank
from lora_cli.errors import NothingMatched, UsageError
from lora_cli.fit_methods import Learning, Measure, Search
from lora_cli.formats.reader import OpenAdapter
from lora_cli.metrics import METRICS
from lora_cli.models.base_model import BaseModel
from lora_cli.models.mixture import Mixture, Parameters
from lora_cli.models.noise import Noise
from lora_cli.recipes import FIT_METHODS, Recipe, Shape
from lora_cli.records import Coefficients, Example, Progress, silent
from lora_cli.steps.evaluate.groups import Judging
from lora_cli.steps.fit.candidate import write_candidate
from lora_cli.steps.fit.command import Command
from lora_cli.steps.fit.objective import (
    ByAnswers,
    ByCommand,
    ByLikelihood,
    Held,
    Judged,
    Objective,
    Outside,
    direction,
    options_of,
)
from lora_cli.steps.fit.search import search
from lora_cli.steps.merge.stream import MergePlan
from lora_cli.steps.train.batch import within
from lora_cli.steps.train.descent import Checkpoint, Goal, Learnt, Parts, identity, learn
from lora_cli.task import HeldOut
from lora_cli.text import nearest, shortened

NOISES: Mapping[str, Noise] = {"random": "norm", "random-pooled": "pooled"}
"""The controls that fit noise, and the noise of each."""
CONTROLS = (*NOISES, "target", "base")


@dataclass(frozen=True, slots=True, kw_only=True)
class FitResult:
    """Coefficients and how they were found. `n_train` and `n_validation` count the two parts of the data.

    `updates` is the fitted mixture itself, one exact update per module (of noise, where the fit was over noise).
    `trained` holds each adapter's factors by module, where the fit trained them. `measure` names what the losses are,
    `kept` the step whose parameters they belong to. `judged` is the objective of a search, None for a descent.
    """

    coefficients: Coefficients
    updates: Mapping[str, LowRank] = field(repr=False)
    trained: Sequence[Mapping[str, LowRank]] = field(repr=False, default=())
    measure: Measure
    kept: str
    learnt: Learnt
    judged: Judged | None = None
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
    command: the user's command, where it is the objective of a search, and `plan`: how its candidates are written.
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
    command: Command | None = None
    plan: MergePlan | None = None
    deadline: float = math.inf

    def __post_init__(self) -> None:
        demand_sane(self.shape, self.controls)
        if self.shape.command and (self.command is None or self.plan is None):
            raise UsageError("an objective that is a command needs the command, and the plan of the merge")

    def parts(self, base: BaseModel, examples: Sequence[Example]) -> Parts:
        """The examples split and encoded, or only their prompts, if the fit learns from no answers."""
        encode = base.encode_all if self.shape.labelled else base.encoder.prompts_of
        return Parts.of(encode, examples, held=self.held, seed=self.recipe.seed)

    def coefficients(self, base: BaseModel, mixture: Mixture, parameters: Parameters) -> Coefficients:
        """The current coefficients of a mixture on a base."""
        return Coefficients(
            adapters=mixture.adapters,
            values=mixture.values(),
            granularity=parameters.granularity,
            activation=parameters.activation,
            task_sha256=self.task_sha256,
            base=base.name,
            trained=parameters.trained,
        )


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
    recipe = within(recipe, len(parts.training))
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
        of_search = learning.search is not None
        state = Checkpoint(checkpoint.with_suffix(".json") if of_search else checkpoint, key, how.deadline)
    told = functools.partial(progress, f"fit: noise, {reinit}" if reinit else "fit: adapters")
    with mixture.applied(base):
        judged = None
        if learning.search is not None:
            searched = _Searched(base, mixture, examples, parts, how, learning, noise=reinit is not None)
            learnt, judged = searched.found(state, told)
        else:
            goal = goal_of(learning, mixture, recipe)
            learnt = learn(base, mixture.learnt, parts, recipe, goal=goal, checkpoint=state, progress=told)
    return FitResult(
        coefficients=how.coefficients(base, mixture, learning.parameters),
        updates=mixture.updates(),
        trained=mixture.factors() if learning.parameters.trained else (),
        measure=learning.measure,
        kept=learning.told(learnt.best_step),
        learnt=learnt,
        judged=judged,
        n_train=len(parts.training),
        n_validation=len(parts.validation),
    )


@dataclass(frozen=True, slots=True)
class _Searched:
    """A search by the objective of a preset; `base` already runs through `mixture`, of noise if `noise` says so."""

    base: BaseModel
    mixture: Mixture
    examples: Sequence[Example]
    parts: Parts
    how: Fitting
    learning: Learning
    noise: bool = field(kw_only=True)

    def found(self, state: Checkpoint | None, progress: Callable[[int, int], None]) -> tuple[Learnt, Judged]:
        """What the search found, and the objective's values of it."""
        way, seed = self.learning.search, self.how.recipe.seed
        assert way is not None
        training, validation = self.how.held.parts(self.examples, seed=seed)
        command = self.how.command
        held = Held(self.base, validation, options_of(way)) if command is None else Outside(command)
        before = held.each()
        learnt, start, best = search(
            self.base,
            self.mixture,
            self.parts,
            self.learning,
            self._objective(way, training, state),
            seed=seed,
            checkpoint=state,
            progress=progress,
        )
        return learnt, Judged(
            name=way.objective if command is None else "command",
            better=direction(way),
            training=(start, best),
            before=before,
            after=held.each(),
            of_folder=held.of_folder,
        )

    def _objective(self, way: Search, training: Sequence[Example], state: Checkpoint | None) -> Objective:
        if self.how.command is not None:
            return ByCommand(self.mixture, self.how.command, self._write, None if state is None else state.file)
        metric = METRICS.get(way.objective)
        if metric.kind == "likelihood":
            return ByLikelihood(self.base, self.mixture, self.parts.training, metric)
        return ByAnswers(self.base, self.mixture, Judging.of(self.base, training, options_of(way)))

    def _write(self, folder: Path) -> None:
        """The candidate of the current coefficients as a folder."""
        assert self.how.plan is not None
        coefficients = self.how.coefficients(self.base, self.mixture, self.learning.parameters)
        write_candidate(self.how.plan, coefficients, self.mixture.factors() if self.noise else (), folder)


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
    """UsageError for an unknown control, a new LoRA beside a fit without answers, a command of unknown direction, or a
    preset that fits nothing."""
    if shape.routes:
        raise UsageError(f"{shape.preset} makes a router and fits nothing", hint="use steps.fit.route")
    _demand_direction(shape)
    if "target" in controls and not shape.labelled:
        raise UsageError(
            "--control target trains on answers, which --objective entropy does not read", hint="leave it out"
        )
    for control in controls:
        if control not in CONTROLS:
            raise UsageError(f"unknown control {control!r}", hint=f"one of {', '.join(CONTROLS)}")


def _demand_direction(shape: Shape) -> None:
    """UsageError for a command of which nothing says which numbers are better, and for a metric with its own."""
    names, directed = ", ".join(METRICS.methods), shape.knobs.get("better", "metric") != "metric"
    if shape.command and not directed:
        raise UsageError(
            f"--objective {shortened(shape.command)} is a command: say which of its numbers are better",
            hint=nearest(shape.command, METRICS.methods, f"--better higher or --better lower; the metrics are {names}"),
        )
    if directed and not shape.command:
        raise UsageError("--better is for an --objective that is a command", hint=f"{names} have their own direction")
