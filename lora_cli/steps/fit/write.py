"""A fit, its controls and its merge as one folder."""

import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from msgspec import structs

from lora_cli.errors import Partial, Refused
from lora_cli.formats.coefficients import COEFFICIENTS_FILE
from lora_cli.formats.kinds import CONFIG_NAME, WEIGHTS_NAME
from lora_cli.formats.reader import open_adapter
from lora_cli.formats.run_record import Run
from lora_cli.formats.store import AdapterFiles, folder_ref
from lora_cli.hashes import sha256_of
from lora_cli.models.base_model import BaseModel
from lora_cli.models.recompute import recomputed
from lora_cli.outputs import whole_folder
from lora_cli.recipes import TrainOptions
from lora_cli.records import Example, Progress, silent
from lora_cli.steps.fit.candidate import with_coefficients, write_coefficients
from lora_cli.steps.fit.controls import Comparison, Trial, compared
from lora_cli.steps.fit.fit import FitResult, Fitting, fit
from lora_cli.steps.fit.objective import Judged
from lora_cli.steps.merge.stream import MergePlan, MergeReport, merge
from lora_cli.steps.train.descent import TRACE_FILE, losses, write_trace


@dataclass(frozen=True, slots=True, kw_only=True)
class FitReport:
    """The result of `fit_and_write`: the trials by each seed, and the merged adapter, which is that of the first.

    `loss_merged` is the validation loss of the adapter as written, after reduction of its rank and rounding.
    """

    trials: tuple[Trial, ...]
    merge: MergeReport
    loss_merged: float


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

    The folder is a PEFT adapter with coefficients.json, trace.jsonl and run.json. It is whole or absent. States beside
    it, from which a killed or stopped fit resumes, are removed at the end.

    Args:
        plan: the adapters, and how the result is to be reduced; its weights are not used.

    Raises:
        Refused: every coefficient is 0, so there is nothing to write.
        Partial: the time limit came before the end; the folder holds the best so far, its record says so, and states
            are kept. Also the errors of `fit`, `train` and `merge`.
    """
    if "target" in how.controls:
        # Check the settings of the control before the fit, not after it.
        with base.new_adapter(**TrainOptions().shape, seed=how.recipe.seed):
            pass
    with recomputed(base.model) if how.recompute else nullcontext():
        trials = _trials(base, plan, examples, folder, run, how, progress)
    first = trials[0]
    run.unfinished = trials[-1].stopped
    with whole_folder(folder, replace=replace_folder) as partial:
        report = _merged(plan, first.result, partial, run, progress)
        run.outputs[TRACE_FILE] = write_trace(first.result.learnt, partial)
        written = AdapterFiles(folder_ref(partial), partial / CONFIG_NAME, partial / WEIGHTS_NAME)
        merged = open_adapter(written, base.skeleton)
        with base.applied({module: merged.read(module) for module in merged.modules}):
            loss_merged, _ = losses(base, how.parts(base, examples).validation, first.result.goal)
        run.results.update(_results(trials, loss_merged))
        run.write(partial)
    if run.unfinished:
        learnt = first.result.learnt
        raise Partial(
            f"{folder}: the time limit came in {run.unfinished}; the folder holds the best so far, of {learnt.unit} "
            f"{learnt.best_step}, with a validation loss of {learnt.loss_after:.3f}",
            hint="run the same command again to go on from there",
        )
    forget_states(folder, run)
    return FitReport(trials=tuple(trials), merge=replace(report, folder=folder), loss_merged=loss_merged)


def forget_states(folder: Path, run: Run) -> None:
    """Remove the states beside `folder` from which a killed or stopped fit resumes."""
    for state in folder.absolute().parent.glob(f"{_state(run)}*"):
        if state.is_dir():  # the candidate of a killed search
            shutil.rmtree(state, ignore_errors=True)
        else:
            state.unlink(missing_ok=True)


def _state(run: Run) -> str:
    """The beginning of the names of all states of a fit."""
    return f".fit-{run.key[:16]}"


def _trials(
    base: BaseModel,
    plan: MergePlan,
    examples: Sequence[Example],
    folder: Path,
    run: Run,
    how: Fitting,
    progress: Progress,
) -> list[Trial]:
    """A trial by each seed, the last one where the time limit came."""
    trials: list[Trial] = []
    for number in range(how.seeds):
        own = replace(how, recipe=structs.replace(how.recipe, seed=how.recipe.seed + number))

        def state(what: str, seed: int = own.recipe.seed) -> Path:
            return folder.absolute().parent / f"{_state(run)}-{seed}-{what}.npz"

        whole = fit(base, plan.adapters, examples, own, checkpoint=state("fit"), progress=progress)
        result = replace(whole, updates={})  # as large as all adapters, and not needed beside the controls
        if number == 0:
            _demand_effect(result)
        trials.append(compared(base, plan.adapters, examples, own, result, state, progress=progress))
        if trials[-1].stopped:
            break
    return trials


def _demand_effect(result: FitResult) -> None:
    """Refuse a fit that ended where it began, if that is the base or has an adapter that adds nothing."""
    learnt = result.learnt
    is_base = not any(c for values in result.coefficients.values.values() for per_rank in values for c in per_rank)
    adds_nothing = not all(any(update.B.any() for update in factors.values()) for factors in result.trained)
    if not (is_base or adds_nothing):
        return
    start = f"lowers the validation {result.measure} of {learnt.loss_before:.3f}"
    if (judged := result.judged) is not None:
        verb, what = "raises" if judged.better == "higher" else "lowers", _number_of(judged)
        start = f"{verb} {what}, {judged.training[0]:.3f}"
    if not learnt.finished:
        raise Partial(
            f"the time limit came at {learnt.place}, and no {learnt.unit} so far {start}",
            hint="run the same command again to go on from there",
        )
    if is_base:
        raise Refused(
            f"no {learnt.unit} {start}: the base alone is best",
            hint="choose other adapters, or raise --steps (of a search --evaluations)",
        )
    raise Refused(
        f"no step {start}: the target's new factors stay 0",
        hint="lower --lr, or start from the target's own factors with --redraw none",
    )


def _number_of(judged: Judged) -> str:
    return "the number of the command" if not judged.before else f"{judged.name} on the training examples"


def _merged(plan: MergePlan, result: FitResult, folder: Path, run: Run, progress: Progress) -> MergeReport:
    """Merge with the coefficients into `folder`, which exists, and write them beside the result."""
    inner, coefficients = folder / "merged", result.coefficients
    report = merge(with_coefficients(plan, coefficients, result.trained), inner, run, progress=progress)
    for file in list(inner.iterdir()):
        file.rename(folder / file.name)
    inner.rmdir()
    run.outputs[COEFFICIENTS_FILE] = sha256_of(write_coefficients(coefficients, folder))
    return report


def _results(trials: Sequence[Trial], loss_merged: float) -> dict[str, Any]:
    """The results of the first trial, which made the folder, and the losses of all if there are several."""
    first, learnt = trials[0], trials[0].result.learnt
    found = {
        "loss": learnt.loss_after,
        "loss_merged": loss_merged,
        "best_step": learnt.best_step,
        "n_train": first.result.n_train,
        "n_validation": first.result.n_validation,
        "curve": [asdict(point) for point in learnt.curve],
        "comparisons": [_stored(comparison) for comparison in first.comparisons],
    }
    if (judged := first.result.judged) is not None:
        found["objective"] = _of_objective(judged)
    if len(trials) > 1:
        found["seeds"] = [
            {"seed": trial.seed, "loss": trial.result.learnt.loss_after, "best_step": trial.result.learnt.best_step}
            | {"others": {one.against: one.loss for one in trial.comparisons}}
            | ({} if trial.result.judged is None else {"objective": _of_objective(trial.result.judged)})
            for trial in trials
            if not trial.stopped
        ]
    return found


def _stored(comparison: Comparison) -> dict[str, Any]:
    found = asdict(comparison)
    return found if comparison.objective is not None else {k: v for k, v in found.items() if k != "objective"}


def _of_objective(judged: Judged) -> dict[str, Any]:
    """The values of an objective at the start and of what was found."""
    found = {"name": judged.name, "better": judged.better, "training": dict(zip(_ENDS, judged.training, strict=True))}
    if not judged.before:
        return found
    return found | {"validation": dict(zip(_ENDS, map(fmean, (judged.before, judged.after)), strict=True))}


_ENDS = ("start", "best")
