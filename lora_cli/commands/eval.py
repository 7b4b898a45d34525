"""`lora eval`: score adapters on a task, on one loaded base."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_cli.columns import Column, on_request
from lora_cli.commands import completing
from lora_cli.commands.chosen import chosen_or_last
from lora_cli.commands.eval_harness import demand_nothing_else, evaluate_by_harness
from lora_cli.commands.options import (
    Command,
    DrawnListing,
    Loaded,
    Prompts,
    Resume,
    downloads,
    examples,
    show_plan,
    with_flags,
)
from lora_cli.errors import Refused, UsageError
from lora_cli.harness_options import HarnessOptions
from lora_cli.methods import Method
from lora_cli.options import Flag
from lora_cli.precision import remedy
from lora_cli.recipes import EvalOptions
from lora_cli.records import Score
from lora_cli.screen import Screen, near
from lora_cli.settings import base_of
from lora_cli.text import counted, difference, interval, shortened

if TYPE_CHECKING:
    from lora_cli.steps.evaluate.request import EvaluateRequest

_COLUMNS = (
    Column("SYSTEM", "system", wide=True, least=18),
    Column("SCORE", "value", "right", show=lambda row: f"{row['value']:.3f}"),
    Column("95 % CI", "interval", "right", show=lambda row: interval(row["low"], row["high"])),
    Column("DELTA", "difference", "right", of="delta", show=lambda row: _difference(row)),
    Column("P", "p", "right", minor=True),
    Column("P HOLM", "p_holm", "right", minor=True),
    Column("CHANGED", "changed_of", "right", of="changed", show=lambda row: _changed(row)),
    Column("LOG-LIK", "log_likelihood", "right", minor=True),
    Column("TOK/S", "tokens_per_second", "right", minor=True, show=lambda row: _whole(row["tokens_per_second"])),
    *on_request("low", "high", "delta", "delta_low", "delta_high", "changed"),
    *on_request("n", "metric", "baseline", "cut", "details"),
)
# From so many adapters on, the best one's score is mostly luck unless they differ much.
_MANY = 5
_MOST_NAMED = 5
# An answer that is at least so frequent is worth a line.
_OFTEN = 0.05


class Tested(Loaded, frozen=True, kw_only=True):
    """`Loaded`, for a command that scores a task."""

    test: Annotated[
        Path | None,
        Flag(help="Task file.", name="data", default="the setting test, else the last fit's validation part"),
    ] = None


def evaluate(
    adapters: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="ADAPTER...",
            help="Ids of the catalogue or the Hub, folders, or - for stdin.",
            show_default="the last results of merge, fit and train",
            autocompletion=completing.adapters,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File for the rows (JSONL).", show_default="below ./lora-runs")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan as data and change nothing.")] = False,
    allow_no_effect: Annotated[
        bool, typer.Option("--allow-no-effect", help="Only warn of an adapter that changes nothing.")
    ] = False,
    resume: Resume = True,
    *,
    setup: Tested,
    options: EvalOptions,
    harness: HarnessOptions,
    listing: Annotated[DrawnListing, _COLUMNS],
    prompts: Prompts,
) -> None:
    """Evaluate adapters and the bare base on a task, with intervals, on one load of the base.

    Every output is stored as a row of a JSONL file; a killed evaluation resumes from it. If an adapter changes neither
    an output nor a likelihood, the command prints its table and fails (exit 5): the adapter was loaded, not applied.
    --allow-no-effect makes a warning of it.
    `lora eval show`, another name of `lora runs answers`, shows the wrong answers, and what changes from one system to
    another. With --harness the tasks are those of lm-evaluation-harness, which computes the scores.
    """
    if harness.tasks:
        demand_nothing_else(dry_run or allow_no_effect or setup.test or listing.plot or _are_given(options, prompts))
        evaluate_by_harness(adapters, out, setup, options, harness, listing, resume=resume)
        return
    if dry_run:
        _show_plan(adapters, out, setup, options, listing, prompts)
        return

    from dataclasses import asdict

    from lora_cli.steps.evaluate.request import EvaluateRequest
    from lora_cli.steps.opened_pool import open_pool

    screen, settings, prompting, plot = listing.screen(), setup.load(), prompts.prompting(), listing.plot
    base_of(settings)
    with screen.progress() as progress, open_pool(settings, screen.say, progress) as pool:
        request = EvaluateRequest(pool, chosen_or_last(pool, adapters, settings), settings, options, prompting)
        scores = request.run(settings.db, out=out, resume=resume, progress=progress)
    if plot is not None:
        from lora_cli.plots.results import draw_scores

        draw_scores(plot, scores, request.task.file.name)
    screen.rows(
        "lora.eval/1",
        _COLUMNS,
        [asdict(score) for score in scores],
        identity="system",
        caption=f"{request.metric.name}, {request.metric.better} is better, n = {scores[0].n}, paired differences to "
        f"{options.baseline}, bootstrap seed {settings.seed}",
        extra=_facts_of(request, plot),
    )
    _tell(screen, scores, request)
    if plot is not None:
        screen.say(f"  plot: {near(plot)}")
    _demand_effect(screen, scores, allow_no_effect)


def _are_given(options: EvalOptions, prompts: Prompts) -> bool:
    """Whether options are given that decide an evaluation on a task file alone."""
    return prompts != Prompts() or options != EvalOptions(baseline=options.baseline, batch_size=options.batch_size)


def _facts_of(request: "EvaluateRequest", plot: Path | None) -> dict[str, Any]:
    """What a document says beside the scores."""
    return {
        **request.run_settings,
        "usual_answer": request.facts.usual,
        "usual_share": request.facts.usual_share,
        "rows_file": str(request.rows_file),
        "plot": None if plot is None else str(plot),
    }


def _show_plan(
    adapters: list[str] | None,
    out: Path | None,
    setup: Tested,
    options: EvalOptions,
    listing: DrawnListing,
    prompts: Prompts,
) -> None:
    """The plan of an evaluation: prompts, tokens, batches, and what it needs."""
    screen, settings, prompting = listing.screen(), setup.load(), prompts.prompting()
    if screen.format not in ("auto", "json") or listing.columns or listing.plot:
        raise UsageError("--dry-run prints a plan, as text or with --json", hint="leave out the other output options")
    base_of(settings)

    from lora_cli.steps.estimate_eval import planned
    from lora_cli.steps.opened_pool import open_pool

    with screen.progress() as progress, open_pool(settings, screen.say, progress) as pool:
        names = chosen_or_last(pool, adapters, settings)
        found = planned(pool, names, settings, options, prompting, out)
    fetched = downloads(found.absent) if found.absent else {}
    show_plan(screen, "lora.eval.plan/1", {**found.plan, **fetched}, found.needs)


def _tell(screen: Screen, scores: list[Score], request: "EvaluateRequest") -> None:
    """The effect of each adapter, what its score means, and the answers that were cut."""
    from lora_cli.scores import too_few

    metric, options, facts = request.metric, request.options, request.facts
    if metric.score == "share" and facts.usual_share >= _OFTEN and facts.usual_share * facts.examples > 1:
        screen.say(f"eval: always answering {shortened(facts.usual)!r} would score {facts.usual_share:.3f}")
    for score in scores[1:]:
        if not _failed(score):
            screen.say(
                f"eval: {score.system} changed the {metric.kind} on {score.changed} of {counted(score.n, 'prompt')}"
            )
        if score.changed == 0 < score.details["moved"]:
            screen.warn(f"{score.system} changes likelihoods slightly but not a single {metric.kind}")
        if failed := score.details.get("not_finite"):
            screen.warn(
                f"{score.system}: numbers of the model are not finite on {failed} of {score.n} prompts, which count as "
                f"failures; {remedy(request.ref.compute, 'leave it out')}"
            )
    screen.say(verdict(scores, metric, options.baseline))
    if few := too_few(scores[0].n, "example", len(scores) - 1):
        screen.say(f"note: {few}")
    for note in flattery(scores):
        screen.say(f"note: {note}")
    if cut := [f"{score.system} {score.cut}" for score in scores if score.cut]:
        answers = "wrong answers" if metric.score == "share" else "answers"
        screen.warn(
            f"{answers} cut at --max-new-tokens {options.max_new_tokens}: {', '.join(cut)} of {scores[0].n}; "
            "a higher limit may change the scores"
        )


def verdict(scores: list[Score], metric: Method, baseline: str) -> str:
    """Which systems are better or worse than the baseline, as far as that is beyond chance."""
    higher = metric.better == "higher"
    found: dict[str, list[str]] = {"better than": [], "worse than": [], "no measurable difference to": []}
    compared = [score for score in scores if score.delta is not None and not _failed(score)]
    if not compared:
        return "eval: nothing to compare"
    for score in compared:
        word = "better than" if ((score.delta or 0) > 0) == higher else "worse than"
        found[word if score.measurable else "no measurable difference to"].append(score.system)
    said = [f"{word} {baseline}: {_some(names)}" for word, names in found.items() if names]
    corrected = f" ({len(compared):,} comparisons, p by Holm)" if len(compared) > 1 else ""
    return f"eval: {' · '.join(said)}{corrected}"


def flattery(scores: list[Score]) -> Iterator[str]:
    """The note about the best of many adapters."""
    for score in scores:
        facts = score.details
        if facts.get("best_of", 0) >= _MANY:
            yield (
                f"the best of {facts['best_of']:,} adapters, {score.system}, has {score.value:.3f}; if all were alike, "
                f"the best would have {facts['best_by_chance']:.3f} by chance (p {facts['best_p']:.3f}). "
                "Being chosen flatters it: score it again on other examples"
            )


def _failed(score: Score) -> bool:
    """Whether no answer of a system counts: a number of the model was not finite on every prompt."""
    return bool(score.details.get("not_finite") == score.n)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED:,} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def _demand_effect(screen: Screen, scores: list[Score], allowed: bool) -> None:
    """Refused if no adapter can be judged, or if one changes nothing and that is not allowed."""
    if scores[1:] and all(map(_failed, scores[1:])):
        raise Refused(
            "no adapter can be judged: NaN or Inf in the model's numbers on every prompt",
            hint="lora pool verify --deep says what is wrong with each",
        )
    idle = [score for score in scores[1:] if score.details["moved"] == 0]
    if not idle:
        return
    fault = (
        f"no effect of {', '.join(score.system for score in idle)}: all outputs and likelihoods equal those of the "
        f"base, on {counted(idle[0].n, 'prompt')}"
    )
    if not allowed:
        hint = "its modules may not match this base: check with 'lora pool verify', or accept it with --allow-no-effect"
        raise Refused(fault, hint=hint)
    screen.warn(fault)


def _difference(row: Mapping[str, Any]) -> str | None:
    return None if row["delta"] is None else difference(row["delta"], row["delta_low"], row["delta_high"])


def _changed(row: Mapping[str, Any]) -> str | None:
    return None if row["changed"] is None else f"{row['changed']}/{row['n']}"


def _whole(number: float | None) -> str | None:
    return None if number is None else f"{number:.0f}"


def register(root: typer.Typer) -> None:
    """Add `lora eval` to the command tree."""
    root.command(
        "eval",
        cls=Command,
        epilog=examples(
            "lora eval",
            "lora eval pool/tarn/mirror pool/mossy/double --data task.jsonl --metric nll --json",
            "lora eval pool/tarn/mirror pool/mossy/double --data task.jsonl --max-new-tokens 8",
            "lora eval pool/tarn/mirror pool/mossy/double --data task.jsonl --dry-run",
        ),
    )(with_flags(evaluate))
