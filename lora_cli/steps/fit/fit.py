"""Fit coefficients to a task: the family of arXiv 2602.12323 by its presets, and the random-weight control."""

import functools
import hashlib
import importlib.metadata
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from lora_cli.algebra.lowrank import LowRank
from lora_cli.errors import NothingMatched, Refused, UsageError
from lora_cli.fit_methods import Learning, Measure
from lora_cli.formats.coefficients import COEFFICIENTS_FILE, coefficients_text
from lora_cli.formats.kinds import CONFIG_NAME, WEIGHTS_NAME
from lora_cli.formats.reader import OpenAdapter, open_adapter
from lora_cli.formats.run_record import Run
from lora_cli.formats.store import AdapterFiles, folder_ref, sha256_of
from lora_cli.models.base_model import BaseModel
from lora_cli.models.mixture import Mixture
from lora_cli.outputs import whole_folder
from lora_cli.recipes import FIT_METHODS, Recipe, Shape, TargetRecipe, TrainOptions
from lora_cli.records import Coefficients, Example, Progress, silent
from lora_cli.scores import Difference, paired_difference
from lora_cli.steps.fit.search import search
from lora_cli.steps.merge.stream import MergePlan, MergeReport, merge
from lora_cli.steps.train.descent import Checkpoint, Goal, Learnt, Parts, learn, losses
from lora_cli.steps.train.train import train
from lora_cli.task import HELD_OUT, split

CONTROLS = ("random", "target")


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitting:
    """How coefficients are learnt.

    shape: the preset, and its knobs that are turned; default `adaptive` as it is.
    recipe: default 100 steps of 8 examples at the preset's learning rate.
    fraction: share of the examples held out to choose the best step.
    target: `id@commit` of the adapter that was trained on the task itself, if there is one; it joins in front of the
        others.
    controls: "random", the same fit over noise; "target", a new LoRA trained on the same data.
    task_sha256: SHA-256 of the task's file, which the coefficients name.

    Raises UsageError for an unknown control, or one that the preset has no use for.
    """

    shape: Shape = field(default_factory=Shape)
    recipe: Recipe = field(default_factory=Recipe)
    fraction: float = HELD_OUT
    target: str = ""
    controls: Sequence[str] = ()
    task_sha256: str = ""

    def __post_init__(self) -> None:
        demand_sane(self.shape, self.controls)

    def parts(self, base: BaseModel, examples: Sequence[Example]) -> Parts:
        """The examples split and encoded, or only their prompts, if the fit learns from no answers."""
        encode = base.encode_all if self.shape.labelled else base.encoder.prompts_of
        training, validation = split(examples, fraction=self.fraction, seed=self.recipe.seed)
        return Parts(encode(training), encode(validation))


def fit(
    base: BaseModel,
    adapters: Sequence[OpenAdapter],
    examples: Sequence[Example],
    how: Fitting | None = None,
    *,
    reinit: bool = False,
    checkpoint: Path | None = None,
    progress: Progress = silent,
) -> FitResult:
    """Fit coefficients as `how.shape` says on 80 % of the examples, and measure them on the rest.

    Args:
        reinit: the control: noise of the same spread in place of every adapter's factors, the target's excepted.
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
    key = json.dumps(
        [base.pinned, str(base.dtype), base.encoder.prompting.settings, mixture.adapters, shape.settings]
        + [recipe.settings, how.fraction, kept, reinit]
        + [asdict(example) for example in examples]
    )
    state = None if checkpoint is None else Checkpoint(checkpoint, hashlib.sha256(key.encode()).hexdigest())
    told = functools.partial(progress, "fit: random control" if reinit else "fit: adapters")
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
class FitReport:
    """The result of `fit_and_write`: the fit, the merged adapter, and the comparisons, the base's first.

    `loss_merged` is the validation loss of the adapter as written, after reduction of its rank and rounding.
    """

    fit: FitResult
    merge: MergeReport
    loss_merged: float
    comparisons: tuple[Comparison, ...]


def run_settings(
    plan: MergePlan,
    *,
    shape: Shape,
    recipe: Recipe,
    target: str = "",
    controls: Sequence[str] = (),
    data: str,
) -> dict[str, Any]:
    """The settings of a run that fits, beside those of the base. `data` is the task file's name."""
    reduction = {"rank": plan.options.rank, "energy": plan.options.energy}
    if FIT_METHODS.get(shape.preset).kind == "search":
        found = {"seed": recipe.seed, "cma": importlib.metadata.version("cma")}
    else:
        found = shape.completed(recipe).settings
    return {**shape.settings, **found, "target": target, "controls": list(controls), **reduction, "data": data}


def demand_sane(shape: Shape, controls: Sequence[str] = ()) -> None:
    """UsageError for an unknown control, or a new LoRA beside a fit without answers."""
    if "target" in controls and not shape.labelled:
        raise UsageError(
            "--control target trains on answers, which --objective entropy does not read", hint="leave it out"
        )
    for control in controls:
        if control not in CONTROLS:
            raise UsageError(f"unknown control {control!r}", hint=f"one of {', '.join(CONTROLS)}")


def fit_and_write(
    base: BaseModel,
    plan: MergePlan,
    examples: Sequence[Example],
    folder: Path,
    run: Run,
    how: Fitting,
    *,
    replace_folder: bool = False,
    progress: Progress = silent,
) -> FitReport:
    """Fit, compare with the controls, merge with the coefficients found, and write all of it as one folder.

    The folder is a PEFT adapter with coefficients.json and run.json. It is whole or absent. States beside it, from
    which a killed fit resumes, are removed at the end.

    Args:
        plan: the adapters, and how the result is to be reduced; its weights are not used.

    Raises:
        Refused: every coefficient is 0, so there is nothing to write. Also the errors of `fit`, `train` and `merge`.
    """
    states = [folder.absolute().parent / f".fit-{run.key[:16]}{part}.npz" for part in ("", "-control")]
    if "target" in how.controls:
        # Check the settings of the control before the fit, not after it.
        with base.new_adapter(**TrainOptions().shape, seed=how.recipe.seed):
            pass
    result = fit(base, plan.adapters, examples, how, checkpoint=states[0], progress=progress)
    _demand_effect(result)
    found = _controls(base, plan.adapters, examples, how, states[1], progress)
    validation, goal = how.parts(base, examples).validation, Goal(measure=_MEASURES[result.measure])
    loss_base, each_base = losses(base, validation, goal)
    ours, seed = result.learnt.each_after, how.recipe.seed
    comparisons = [_compared("base", loss_base, each_base, ours, seed)] + [
        _compared(name, learnt.loss_after, learnt.each_after, ours, seed) for name, learnt in found.items()
    ]
    with whole_folder(folder, replace=replace_folder) as partial:
        report = _merged(plan, result, partial, run, progress)
        written = AdapterFiles(folder_ref(partial), partial / CONFIG_NAME, partial / WEIGHTS_NAME)
        merged = open_adapter(written, base.skeleton)
        with base.applied({module: merged.read(module) for module in merged.modules}):
            loss_merged, _ = losses(base, validation, goal)
        run.results.update(_results(result, loss_merged, comparisons))
        run.write(partial)
    for state in states:
        state.unlink(missing_ok=True)
    return FitReport(
        fit=result,
        merge=replace(report, folder=folder),
        loss_merged=loss_merged,
        comparisons=tuple(comparisons),
    )


def _demand_effect(result: FitResult) -> None:
    """Refused if the fit ended where it began, and that is the base or has an adapter that adds nothing."""
    start = f"no step lowers the validation {result.measure} of {result.learnt.loss_before:.3f}"
    if not any(c for values in result.coefficients.values.values() for per_rank in values for c in per_rank):
        raise Refused(
            f"{start}: the base alone is best",
            hint="choose other adapters, or raise --steps (of a search --evaluations)",
        )
    if not all(any(update.B.any() for update in factors.values()) for factors in result.trained):
        raise Refused(
            f"{start}: the target's new factors stay 0",
            hint="lower --lr, or start from the target's own factors with --redraw none",
        )


def _controls(
    base: BaseModel,
    adapters: Sequence[OpenAdapter],
    examples: Sequence[Example],
    how: Fitting,
    state: Path,
    progress: Progress,
) -> dict[str, Learnt]:
    """What the controls learnt, by name."""
    found: dict[str, Learnt] = {}
    if "random" in how.controls:
        found["random"] = fit(base, adapters, examples, how, reinit=True, checkpoint=state, progress=progress).learnt
    if "target" in how.controls:
        with tempfile.TemporaryDirectory() as scratch:
            long = TargetRecipe(seed=how.recipe.seed)
            found["target"] = train(base, examples, Path(scratch), recipe=long, progress=progress).learnt
    return found


def _merged(plan: MergePlan, result: FitResult, folder: Path, run: Run, progress: Progress) -> MergeReport:
    """Merge with the coefficients into `folder`, which exists, and write them beside the result."""
    inner, coefficients = folder / "merged", result.coefficients
    if result.trained:
        trained = dict(zip(coefficients.adapters, result.trained, strict=True))
        adapters = tuple(_Trained.of(adapter, trained[adapter.ref.pinned]) for adapter in plan.adapters)
        plan = replace(plan, adapters=adapters)
    report = merge(replace(plan, coefficients=coefficients), inner, run, progress=progress)
    for file in list(inner.iterdir()):
        file.rename(folder / file.name)
    inner.rmdir()
    (folder / COEFFICIENTS_FILE).write_text(coefficients_text(coefficients), encoding="utf-8")
    run.outputs[COEFFICIENTS_FILE] = sha256_of(folder / COEFFICIENTS_FILE)
    return report


@dataclass(frozen=True, slots=True, eq=False)
class _Trained(OpenAdapter):
    """An adapter whose factors a fit has trained."""

    factors: Mapping[str, LowRank] = field(repr=False, kw_only=True)

    @classmethod
    def of(cls, adapter: OpenAdapter, factors: Mapping[str, LowRank]) -> "_Trained":
        own = {one.name: getattr(adapter, one.name) for one in fields(adapter) if one.init}
        return cls(**own, factors=factors)

    def read(self, module: str, dtype: torch.dtype = torch.float32) -> LowRank:
        """The trained factors, in place of those in the file."""
        return self.factors[module].to(dtype)


def _compared(name: str, loss: float, each: Sequence[float], ours: Sequence[float], seed: int) -> Comparison:
    return Comparison(against=name, loss=loss, difference=paired_difference(ours, each, seed=seed))


def _results(result: FitResult, loss_merged: float, comparisons: Sequence[Comparison]) -> dict[str, Any]:
    learnt = result.learnt
    return {
        "loss": learnt.loss_after,
        "loss_merged": loss_merged,
        "best_step": learnt.best_step,
        "n_train": result.n_train,
        "n_validation": result.n_validation,
        "curve": [asdict(point) for point in learnt.curve],
        "comparisons": [asdict(comparison) for comparison in comparisons],
    }
