"""`lora eval`: score adapters on a task, on one loaded base."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_cli.commands.chosen import expand
from lora_cli.commands.options import Command, Listing, Loaded, Prompts, base_of, examples, with_flags
from lora_cli.commands.task import tell
from lora_cli.errors import DataError, NothingMatched, Refused, UsageError
from lora_cli.options import Flag, Options
from lora_cli.records import Example, Metric, Score
from lora_cli.screen import Column, near
from lora_cli.settings import Settings
from lora_cli.task import load_task, split, task_sha256

SCORES = "Scores"
_COLUMNS = (
    Column("SYSTEM", "system", wide=True, least=18),
    Column("SCORE", "score", "right"),
    Column("95 % CI", "interval", "right"),
    Column("DELTA", "difference", "right"),
    Column("P", "p", "right", minor=True),
    Column("CHANGED", "changed_of", "right"),
    Column("LOG-LIK", "log_likelihood", "right", minor=True),
    Column("TOK/S", "speed", "right", minor=True),
)


class Tested(Loaded, frozen=True, kw_only=True):
    """`Loaded`, for a command that scores a task."""

    test: Annotated[
        Path | None,
        Flag(help="Task file.", name="data", default="the setting test, else the last fit's validation part"),
    ] = None


class EvalOptions(Options, frozen=True, kw_only=True):
    """How a task is scored."""

    metric: Annotated[
        Metric, Flag(help="exact (share of exact matches) or nll (mean negative log-likelihood).", panel=SCORES)
    ] = "exact"
    baseline: Annotated[str, Flag(help="What differences are to: base, or a system.", panel=SCORES)] = "base"
    max_new_tokens: Annotated[int, Flag(help="Longest output.", minimum=1, panel=SCORES)] = 30
    batch_size: Annotated[int, Flag(help="Prompts per batch.", minimum=1, panel=SCORES)] = 16


def evaluate(
    adapters: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="ADAPTER...",
            help="Ids of the catalogue or the Hub, folders, or - for stdin.",
            show_default="what merge and fit wrote last",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File for the rows (JSONL).", show_default="below ./lora-runs")
    ] = None,
    *,
    setup: Tested,
    options: EvalOptions,
    listing: Listing,
    prompts: Prompts,
) -> None:
    """Evaluate adapters and the bare base on a task, with intervals, on one load of the base.

    Every output is kept as a row of a JSONL file; a killed evaluation goes on from there. An adapter that moves not
    even a likelihood fails the command after its table (exit 5): loaded is not applied.
    """
    from lora_cli import runs
    from lora_cli.base_model import pin
    from lora_cli.steps import evaluate as step
    from lora_cli.steps.opened_pool import open_pool
    from lora_cli.steps.task_view import look

    screen, settings = listing.screen(), setup.load()
    model, metric, baseline = base_of(settings), options.metric, options.baseline
    with screen.progress() as progress, open_pool(settings, screen.say, progress) as pool:
        if adapters:
            chosen = pool.chosen(expand(adapters))
            if chosen.weighted:
                raise UsageError("eval takes adapters without =WEIGHT")
            names = [*chosen.names]
        else:
            names = last_written(settings.db)
            screen.say(f"adapters: {', '.join(near(Path(name)) for name in names)}, written last")
        step.demand_sane(["base", *_distinct(names)], baseline=baseline)
        file, task = test_data(settings)
        screen.say(f"eval: {len(task)} examples of {file.name}{_origin(settings)}; baseline {baseline}; base {model}")
        ref = pin(model, device=settings.device, dtype=settings.dtype, prompting=prompts.prompting())
        gathered = pool.adapters(names)
        ref = replace(ref, name=gathered.base)
        asked = {
            **ref.settings,
            "metric": metric,
            "baseline": baseline,
            "max_new_tokens": options.max_new_tokens,
            "seed": settings.seed,
            "data": file.name,
            "examples": len(task),
        }
        sha256 = task_sha256(file)
        inputs = {**ref.inputs, **gathered.inputs, file.name: sha256}
        rows = out or settings.runs / f"eval-{runs.key_of('eval', asked, inputs)[:8]}.jsonl"

        systems = [step.System(name="base")] + [
            step.System(name=name, updates=step.Updates(adapter), version=adapter.ref.pinned)
            for name, adapter in zip(_distinct(names), gathered.adapters, strict=True)
        ]
        with runs.recorded(settings.db, "eval", asked, inputs, rows) as run:
            run.device = ref.device
            loaded = ref.load()
            tell(screen, look(task, loaded.encoder))
            scores = step.evaluate(
                loaded,
                systems,
                task,
                metric=metric,
                baseline=baseline,
                max_new_tokens=options.max_new_tokens,
                batch_size=options.batch_size,
                seed=settings.seed,
                rows_path=rows,
                progress=progress,
            )
            runs.add_scores(settings.db, run, scores, {system.name: [system.version] for system in systems[1:]}, sha256)
    screen.rows(
        "lora.eval/1",
        _COLUMNS,
        [_row(score) for score in scores],
        identity="system",
        caption=f"{metric}, n = {len(task)}, paired differences to {baseline}, bootstrap seed {settings.seed}",
        extra={**asked, "rows_file": str(rows)},
    )
    what = "output" if metric == "exact" else "likelihood"
    for score in scores[1:]:
        screen.say(f"eval: {score.system} changed the {what} on {score.changed} of {score.n} prompts")
        if score.changed == 0 < score.details["moved"]:
            screen.warn(f"{score.system} is too weak to change an output, though it moves likelihoods")
    _demand_effect(scores)


def last_written(db: Path) -> list[str]:
    """The adapters that merge, fit and train wrote last; NothingMatched when there is none."""
    from lora_cli import runs
    from lora_cli.adapters.checks import CONFIG_NAME

    found = [runs.latest_output(db, [command], CONFIG_NAME) for command in ("merge", "fit", "train")]
    names = [str(output[1]) for output in found if output is not None]
    if not names:
        raise NothingMatched("no adapters named, and none written yet", hint="run lora merge or lora fit, or name some")
    return names


def test_data(settings: Settings) -> tuple[Path, list[Example]]:
    """The file to evaluate on and its examples: that of --data or `test`, else the last fit's validation part.

    Raises:
        UsageError: neither is known.
        DataError: the file of the last fit has changed or is gone, or its record does not name it.
    """
    if settings.test is not None:
        return settings.test, load_task(settings.test)

    from lora_cli import runs

    last = runs.latest_output(settings.db, ["fit"])
    if last is None:
        raise UsageError("no test data", hint="give --data FILE.jsonl, or set test in lora.toml")
    record = runs.read_record(last[1])
    try:
        name, seed = str(record["settings"]["data"]), int(record["settings"]["seed"])
        sha256 = record["inputs"][name]
    except (KeyError, TypeError, ValueError):
        raise DataError(
            f"{near(last[1] / runs.RECORD_FILE)} does not say what the last fit was made on",
            hint="give --data FILE.jsonl",
        ) from None
    for file in (settings.data, Path(name)):
        if file is not None and file.is_file() and task_sha256(file) == sha256:
            return file, split(load_task(file), seed=seed)[1]
    raise DataError(f"{name}, the data of the last fit, is not here or has changed", hint="give --data FILE.jsonl")


def _origin(settings: Settings) -> str:
    return f" ({settings.origin('test')})" if settings.test is not None else " (the validation part of the last fit)"


def _distinct(names: list[str]) -> list[str]:
    """Names for the systems: as given, a full path by its last part, numbered where two are alike."""
    short = [Path(name).name if Path(name).is_absolute() else name for name in names]
    return [
        name if short.count(name) == 1 and name != "base" else f"{name}#{short[: place + 1].count(name)}"
        for place, name in enumerate(short)
    ]


def _demand_effect(scores: list[Score]) -> None:
    if idle := [score for score in scores[1:] if score.details["moved"] == 0]:
        raise Refused(
            f"zero effect: {', '.join(score.system for score in idle)} changed the output on 0 of {idle[0].n} prompts "
            "(not even a likelihood moved: not applied)",
            hint="check the adapter's base and modules with 'lora pool verify'",
        )


def _row(score: Score) -> Mapping[str, Any]:
    from dataclasses import asdict

    shown = {"score": f"{score.value:.3f}", "interval": f"[{score.low:.3f}, {score.high:.3f}]"}
    if score.delta is not None:
        shown["difference"] = f"{score.delta:+.3f} [{score.delta_low:+.3f}, {score.delta_high:+.3f}]"
    if score.changed is not None:
        shown["changed_of"] = f"{score.changed}/{score.n}"
    if score.tokens_per_second is not None:
        shown["speed"] = f"{score.tokens_per_second:.0f}"
    return {**asdict(score), **shown}


def register(root: typer.Typer) -> None:
    """Add `lora eval` to the command tree."""
    root.command(
        "eval",
        cls=Command,
        epilog=examples(
            "lora eval",
            "lora eval pool/tarn/mirror pool/mossy/double --data task.jsonl --metric nll --json",
        ),
    )(with_flags(evaluate))
