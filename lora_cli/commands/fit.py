"""`lora fit`: fit coefficients of adapters to data."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import typer

from lora_cli.commands.chosen import expand
from lora_cli.commands.learning import Validation
from lora_cli.commands.options import (
    Adapters,
    Command,
    DrawnJob,
    OnTask,
    Prompts,
    Resume,
    Selection,
    downloads,
    examples,
    show_output,
    show_plan,
    with_flags,
)
from lora_cli.errors import UsageError
from lora_cli.licences import PolicyFlag
from lora_cli.recipes import FitOptions, Recipe, Shape
from lora_cli.screen import near
from lora_cli.settings import base_of
from lora_cli.text import counted, interval

if TYPE_CHECKING:
    from lora_cli.steps.fit.controls import Comparison, Trial
    from lora_cli.steps.fit.fit import FitResult
    from lora_cli.steps.fit.objective import Judged
    from lora_cli.steps.fit.write import FitReport


class Licensed(OnTask, frozen=True, kw_only=True):
    """`OnTask`, and the policy on licences."""

    license_policy: PolicyFlag = None


def fit(
    adapters: Adapters = None,
    selection: Selection = None,
    resume: Resume = True,
    *,
    setup: Licensed,
    held: Validation,
    shape: Shape,
    recipe: Recipe,
    options: FitOptions,
    job: DrawnJob,
    prompts: Prompts,
) -> None:
    """Fit coefficients of adapters to a task, and merge with them.

    80 % of the examples train the coefficients; the others, or those of --valid, choose the best step. --preset names
    the method: the default learns one coefficient per adapter and module, from the base upwards. The result is a PEFT
    folder with coefficients.json, trace.jsonl (a line per step) and run.json; its path goes to stdout. A gain is
    claimed only where its 95 % interval excludes zero. A killed fit, or one that the time limit stopped, goes on when
    it is run again.

    The presets arrow and spectr learn nothing and need no data: they write a router, which is no LoRA and which
    `lora eval` applies.
    """
    if shape.routes:
        if held.valid is not None:
            raise UsageError(
                f"{shape.preset} takes no --valid: it learns nothing", hint="--data names the examples to measure it on"
            )
        from lora_cli.commands.fit_router import fit_router

        fit_router(adapters, selection, setup, shape, recipe, options, job, prompts)
        return
    screen, settings, prompting = job.screen(), setup.load(), prompts.prompting()
    # Report a missing base or a faulty task before importing libraries, which takes seconds.
    base_of(settings)
    task = setup.task(settings, labelled=shape.labelled, valid=held.valid)

    from lora_cli.steps.bake.plan import is_here
    from lora_cli.steps.estimate import of_fit
    from lora_cli.steps.fit.request import FitRequest
    from lora_cli.steps.opened_pool import open_pool

    with screen.progress() as progress, open_pool(settings, screen.say, progress) as pool:
        names = pool.unweighted(expand(adapters or []), selection, verb="fit")
        request = FitRequest(pool, names, task, settings, shape, recipe, options)
        if job.dry_run and (absent := request.absent()):
            needs = of_fit(request, request.ref(prompting)) if is_here(request.base) else None
            show_plan(screen, "lora.fit.plan/1", {"out": None, **downloads(absent)}, needs)
            return
        fitting = request.prepare(prompting, out=job.out)
        folder = fitting.job.folder
        if job.dry_run:
            found = {"out": str(folder), "adapters": len(fitting.plan.adapters), **fitting.job.settings}
            show_plan(screen, "lora.fit.plan/1", found, of_fit(request, fitting.ref))
            return
        done = fitting.run(settings.db, force=job.force, resume=resume, progress=progress)
    if job.plot is not None:
        draw(job.plot, folder, done.run.results)
    show_output(screen, "lora.fit/1", folder, done.run.record())
    for line in [f"fit: {near(folder)} is up to date"] if done.report is None else outcome(done.report):
        screen.say(line)
    if fitting.notice:
        screen.say(f"  {fitting.notice}")
    if job.plot is not None:
        screen.say(f"  plot: {near(job.plot)}")


def draw(file: Path, folder: Path, results: Mapping[str, Any]) -> None:
    """The picture of a fit, from the results in its record and the coefficients in its folder."""
    from lora_cli.formats.coefficients import COEFFICIENTS_FILE, read_coefficients
    from lora_cli.plots.results import Losses, draw_fit

    # The cost of a search may be in other units than the losses.
    in_nats = results.get("objective", {"name": "nll"})["name"] == "nll"
    losses = Losses(
        points=[(one["step"], one["training"] if in_nats else None, one["validation"]) for one in results["curve"]],
        best_step=results["best_step"],
        others={_NAMES[one["against"]].removeprefix("the "): one["loss"] for one in results["comparisons"]},
    )
    draw_fit(file, losses, read_coefficients(folder / COEFFICIENTS_FILE))


def outcome(report: "FitReport") -> list[str]:
    """The summary of a fit: a line on its loss, and one on each comparison, which claims no more than is measurable."""
    from lora_cli.scores import too_few

    first = report.trials[0]
    base, learnt, judged = first.comparisons[0], first.result.learnt, first.result.judged
    parts = [f"validation {first.result.measure} {base.loss:.3f} → {learnt.loss_after:.3f}"]
    if judged is not None:  # the loss that is held out is the nll held out
        parts = [_by_objective(judged), *(parts if judged.name != "nll" else [])]
    if abs(report.loss_merged - learnt.loss_after) > 0.005 * learnt.loss_after:
        parts.append(f"{report.loss_merged:.3f} after reduction to rank {report.merge.ranks[1]}")
    parts.append(f"{first.result.kept}, {counted(first.result.n_validation, 'validation example')}")
    if learnt.speed:
        parts.append(f"{learnt.speed:,.0f} tokens/s")
    few = too_few(first.result.n_validation, "validation example")
    lines = [*(verdict(one, first.result.measure) for one in first.comparisons), *([few] if few else [])]
    lines += _spread(report.trials) if len(report.trials) > 1 else []
    return [f"fit: {' · '.join(parts)}", *(f"  {line}" for line in lines)]


def _by_objective(judged: "Judged") -> str:
    """What a search did for its objective, on the examples that it learnt from and on those held out."""
    training = f"{judged.training[0]:.3f} → {judged.training[1]:.3f}"
    if not judged.before:
        return f"the command's number {training}, {judged.better} is better"
    held = f"{fmean(judged.before):.3f} → {fmean(judged.after):.3f}"
    return f"{judged.name} {training} on the training examples, {held} on those held out"


def verdict(one: "Comparison", measure: str = "loss") -> str:
    """Whether the gain over one other system is separable from zero, as a sentence; by the objective of a search.

    `measure` names what the losses are.
    """
    of, name, value, difference = one.objective, measure, one.loss, one.difference
    if of is not None:
        name, value = of.name, of.value
        if of.difference is None:  # a command gives one number, from which no interval follows
            return f"beside {_NAMES[one.against]}: the command gives {value:.3f}"
        difference = of.difference
    sign = 1 if of is not None and of.better == "higher" else -1
    low, high = sorted((sign * difference.low, sign * difference.high))
    other = f"{_NAMES[one.against]}, whose {name} is {value:.3f}"
    gained = f"{0 + sign * difference.delta:.3f} {interval(0 + low, 0 + high)}"
    if one.gain:
        return f"gain over {other}: {gained}, separable from zero"
    if one.worse:
        return f"worse than {other}: by {-sign * difference.delta:.3f} {interval(0 - high, 0 - low)}"
    return f"no measurable gain over {other}: {gained}, not separable from zero"


def _spread(trials: Sequence["Trial"]) -> list[str]:
    """Mean and standard deviation over the seeds of the losses or the objective, and of the gains of each seed."""
    judged = trials[0].result.judged
    ours = [_value(trial.result) for trial in trials]
    what = "" if judged is None else f"{judged.name} of the " if judged.before else "the command's number of the "
    heading = f"over {len(trials)} seeds (mean ± standard deviation)"
    lines = [f"{heading}: {what}fit {_about(ours)}; the folder is that of the first"]
    sign = 1 if judged is not None and judged.better == "higher" else -1
    for place, one in enumerate(trials[0].comparisons):
        beside = [trial.comparisons[place] for trial in trials]
        theirs = [other.loss if other.objective is None else other.objective.value for other in beside]
        gains = [sign * (own - other) for own, other in zip(ours, theirs, strict=True)]
        lines.append(f"  {_NAMES[one.against]} {_about(theirs)}, gain of the fit over it {_about(gains)}")
    return lines


def _value(result: "FitResult") -> float:
    """The loss of a fit on the validation examples, or its value by the objective, there or by the command."""
    judged = result.judged
    if judged is None:
        return result.learnt.loss_after
    return fmean(judged.after) if judged.after else judged.training[1]


def _about(values: Sequence[float]) -> str:
    return f"{fmean(values):.3f} ± {stdev(values):.3f}"


_NAMES = {
    "base": "the base",
    "random": "the random-LoRA control",
    "random-pooled": "the pooled random-LoRA control",
    "target": "the target LoRA",
}


def register(root: typer.Typer) -> None:
    """Add `lora fit` to the command tree."""
    root.command(
        cls=Command,
        epilog=examples(
            "lora fit --data task.jsonl",
            "lora fit --data task.jsonl pool/tarn/mirror pool/mossy/double --granularity layer --steps 20 -o fitted",
            "lora fit --data task.jsonl --preset lorahub",
            "lora fit --data task.jsonl --preset lorahub --objective exact --max-new-tokens 8",
            "lora fit --data task.jsonl --control random,base --seeds 2 --steps 20",
            "lora fit --data task.jsonl --plot fit.svg",
            "lora fit --preset arrow pool/tarn/mirror pool/mossy/double -o router",
        ),
    )(with_flags(fit))
