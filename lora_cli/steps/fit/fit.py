"""Learn a coefficient per adapter for a task: the adaptive merge of arXiv 2602.12323 and its random-weight control."""

import hashlib
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_cli.algebra.lowrank import LowRank
from lora_cli.errors import NothingMatched, Refused, UsageError
from lora_cli.formats.coefficients import COEFFICIENTS_FILE, coefficients_text
from lora_cli.formats.kinds import CONFIG_NAME, WEIGHTS_NAME
from lora_cli.formats.reader import OpenAdapter, open_adapter
from lora_cli.formats.run_record import RECORD_FILE, Run, record_text
from lora_cli.formats.store import AdapterFiles, folder_ref, sha256_of
from lora_cli.models.base_model import BaseModel
from lora_cli.models.mixture import Mixture
from lora_cli.outputs import whole_folder
from lora_cli.recipes import Recipe, Shape, TargetRecipe, TrainOptions
from lora_cli.records import Coefficients, Example, Progress, silent
from lora_cli.scores import Difference, paired_difference
from lora_cli.steps.merge.stream import MergePlan, MergeReport, merge
from lora_cli.steps.train.descent import Learnt, learn, losses
from lora_cli.steps.train.train import train
from lora_cli.task import split

CONTROLS = ("random", "target")


@dataclass(frozen=True, slots=True, kw_only=True)
class FitResult:
    """Coefficients and how they were found. `n_train` and `n_validation` count the two parts of the data.

    `updates` is the fitted mixture itself, one exact update per module (of noise, where the fit was over noise).
    """

    coefficients: Coefficients
    updates: Mapping[str, LowRank] = field(repr=False)
    learnt: Learnt
    n_train: int
    n_validation: int


def fit(
    base: BaseModel,
    adapters: Sequence[OpenAdapter],
    examples: Sequence[Example],
    *,
    shape: Shape | None = None,
    l1: float = 0.0,
    recipe: Recipe | None = None,
    fraction: float = 0.2,
    target: OpenAdapter | None = None,
    reinit: bool = False,
    task_sha256: str = "",
    checkpoint: Path | None = None,
    progress: Progress = silent,
) -> FitResult:
    """Fit one coefficient per adapter and module (or as `shape` says) on 80 % of the examples, by loss on the rest.

    Args:
        shape: granularity, activation and start of the coefficients; default per module, leaky ReLU, zero.
        l1: weight of the mean over groups of Σ|θ|.
        recipe: default 100 steps of 8 examples at a learning rate of 0.05.
        fraction: share of the examples held out to choose the best step.
        target: an adapter trained on the task itself; it joins in front of the others.
        reinit: the control: noise of the same spread in place of every adapter's factors, the target's excepted.
        checkpoint: see `learn`.

    Raises:
        NothingMatched: no adapters. Refused: an adapter does not fit, or the loss is not finite.
        DataError: the examples cannot be split, or one is too long. UsageError: settings out of range.
    """
    shape, recipe = shape or Shape(), recipe or Recipe()
    demand_sane(l1=l1)
    if not adapters and target is None:
        raise NothingMatched("no adapters to fit", hint="choose some with 'lora select' or name them")
    together = [*([] if target is None else [target]), *adapters]
    training, validation = split(examples, fraction=fraction, seed=recipe.seed)
    kept = 0 if target is None else 1
    mixture = Mixture(base, together, shape, seed=recipe.seed, reinit=reinit, kept=kept)
    key = json.dumps(
        [base.pinned, str(base.dtype), base.encoder.prompting.settings, mixture.adapters, shape.settings, l1]
        + [recipe.settings, fraction, kept, reinit]
        + [asdict(example) for example in examples]
    )
    with mixture.worn(base):
        learnt = learn(
            base,
            [mixture.theta],
            [base.encode(example) for example in training],
            [base.encode(example) for example in validation],
            recipe,
            penalty=(lambda: l1 * mixture.penalty()) if l1 else None,
            checkpoint=checkpoint,
            key=hashlib.sha256(key.encode()).hexdigest(),
            what="fit: random control" if reinit else "fit: adapters",
            progress=progress,
        )
    coefficients = Coefficients(
        adapters=mixture.adapters,
        values=mixture.values(),
        granularity=shape.granularity,
        activation=shape.activation,
        task_sha256=task_sha256,
        base=base.name,
    )
    return FitResult(
        coefficients=coefficients,
        updates=mixture.updates(),
        learnt=learnt,
        n_train=len(training),
        n_validation=len(validation),
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
        """Whether the interval supports that the fit is better."""
        return self.difference.high < 0


@dataclass(frozen=True, slots=True, kw_only=True)
class FitReport:
    """The result of `fit_and_write`: the fit, the merged adapter, and the comparisons, the base's first.

    `loss_merged` is the validation loss of the adapter as written, after reduction of its rank and rounding.
    """

    fit: FitResult
    merge: MergeReport
    loss_merged: float
    comparisons: tuple[Comparison, ...]


def asked(
    plan: MergePlan,
    *,
    shape: Shape,
    l1: float = 0.0,
    recipe: Recipe,
    target: str = "",
    controls: Sequence[str] = (),
    data: str,
) -> dict[str, Any]:
    """The settings of a run that fits, beside those of the base. `data` is the task file's name."""
    reduction = {"rank": plan.options.rank, "energy": plan.options.energy}
    learning = {**shape.settings, "l1": l1, **recipe.settings, "target": target, "controls": list(controls)}
    return {**learning, **reduction, "data": data}


def demand_sane(*, l1: float = 0.0, controls: Sequence[str] = ()) -> None:
    """UsageError for an invalid L1 factor or an unknown control."""
    if not 0 <= l1 < math.inf:
        raise UsageError(f"--l1 must be 0 or more, not {l1}")
    for control in controls:
        if control not in CONTROLS:
            raise UsageError(f"unknown control {control!r}", hint=f"one of {', '.join(CONTROLS)}")


def fit_and_write(
    base: BaseModel,
    plan: MergePlan,
    examples: Sequence[Example],
    folder: Path,
    run: Run,
    *,
    target: str = "",
    controls: Sequence[str] = (),
    states: Path | None = None,
    replace_folder: bool = False,
    progress: Progress = silent,
    **options: Any,
) -> FitReport:
    """Fit, compare with the controls, merge with the coefficients found, and write all of it as one folder.

    The folder is a PEFT adapter with coefficients.json and run.json. It is whole or absent.

    Args:
        plan: the adapters, and how the result is to be reduced; its weights are not used.
        target: `id@commit` of the plan's adapter that was trained on the task itself, if there is one.
        controls: "random", the same fit over noise; "target", a new LoRA trained on the same data.
        states: folder for the states from which a killed fit resumes; removed at the end.
        options: `shape`, `l1`, `recipe`, `fraction` and `task_sha256` of `fit`.

    Raises:
        UsageError: an unknown control.
        Refused: every coefficient is 0, so there is nothing to write. Also the errors of `fit`, `train` and `merge`.
    """
    demand_sane(controls=controls)
    recipe = options.get("recipe") or Recipe()
    state = None if states is None else states / f".fit-{run.key[:16]}.npz"
    state_of_control = None if states is None else states / f".fit-{run.key[:16]}-control.npz"
    own = [adapter for adapter in plan.adapters if adapter.ref.pinned == target]
    others = [adapter for adapter in plan.adapters if adapter.ref.pinned != target]
    options |= {"target": own[0] if own else None, "progress": progress}
    if "target" in controls:
        # Check the settings of the control before the fit, not after it.
        with base.new_adapter(**TrainOptions().shape, seed=recipe.seed):
            pass
    result = fit(base, others, examples, checkpoint=state, **options)
    if not any(c for values in result.coefficients.values.values() for per_rank in values for c in per_rank):
        raise Refused(
            f"no step lowers the validation loss of {result.learnt.loss_before:.3f}: the base alone is best",
            hint="choose other adapters, or raise --steps",
        )
    found: dict[str, Learnt] = {}
    if "random" in controls:
        found["random"] = fit(base, others, examples, reinit=True, checkpoint=state_of_control, **options).learnt
    if "target" in controls:
        with tempfile.TemporaryDirectory() as scratch:
            long = TargetRecipe(seed=recipe.seed)
            found["target"] = train(base, examples, Path(scratch), recipe=long, progress=progress).learnt
    _, held_out = split(examples, fraction=options.get("fraction", 0.2), seed=recipe.seed)
    validation = [base.encode(example) for example in held_out]
    loss_base, each_base = losses(base, validation)
    ours = result.learnt.each_after
    comparisons = [_compared("base", loss_base, each_base, ours, recipe.seed)] + [
        _compared(name, learnt.loss_after, learnt.each_after, ours, recipe.seed) for name, learnt in found.items()
    ]
    with whole_folder(folder, replace=replace_folder) as partial:
        inner = partial / "merged"
        report = merge(replace(plan, coefficients=result.coefficients), inner, run, progress=progress)
        for file in list(inner.iterdir()):
            file.rename(partial / file.name)
        inner.rmdir()
        (partial / COEFFICIENTS_FILE).write_text(coefficients_text(result.coefficients), encoding="utf-8")
        written = AdapterFiles(folder_ref(partial), partial / CONFIG_NAME, partial / WEIGHTS_NAME)
        merged = open_adapter(written, base.skeleton)
        with base.wear({module: merged.read(module) for module in merged.modules}):
            loss_merged, _ = losses(base, validation)
        run.outputs[COEFFICIENTS_FILE] = sha256_of(partial / COEFFICIENTS_FILE)
        run.results.update(_results(result, loss_merged, comparisons))
        (partial / RECORD_FILE).write_text(record_text(run.record()), encoding="utf-8")
    for used in (state, state_of_control):
        if used is not None:
            used.unlink(missing_ok=True)
    return FitReport(
        fit=result,
        merge=replace(report, folder=folder),
        loss_merged=loss_merged,
        comparisons=tuple(comparisons),
    )


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
