"""`lora pool evaluate`: scores of the pool's adapters on a task, kept in the catalogue."""

from typing import Annotated

import typer

from lora_cli.columns import Column, on_request
from lora_cli.commands.options import Command, Listing, OnTask, Prompts, Selection, Where, examples, with_flags
from lora_cli.metrics import METRICS
from lora_cli.recipes import TrialOptions
from lora_cli.settings import base_of
from lora_cli.text import counted, interval

_COLUMNS = (
    Column("ADAPTER", "id", wide=True),
    Column("SCORE", "value", "right", show=lambda row: f"{row['value']:.3f}"),
    Column(
        "95 % CI",
        "interval",
        "right",
        show=lambda row: None if row["low"] is None else interval(row["low"], row["high"]),
    ),
    Column("EXAMPLES", "n", "right"),
    Column("LOG-LIK", "log_likelihood", "right", minor=True),
    *on_request("low", "high", "imported"),
)


def evaluate(
    where: Where = None,
    selection: Selection = None,
    sample: Annotated[
        int | None, typer.Option("--sample", help="Evaluate so many of them, drawn by the seed.", min=1)
    ] = None,
    k: Annotated[int, typer.Option("-k", help="How many of the best to print, or to find by a race.", min=1)] = 30,
    race: Annotated[
        bool, typer.Option("--race", help="Find the best k with a part of the answers, by successive halving.")
    ] = False,
    *,
    setup: OnTask,
    judging: TrialOptions,
    listing: Annotated[Listing, _COLUMNS],
    prompts: Prompts,
) -> None:
    """Score usable adapters of the pool on a task, on one load of the base, and keep the scores in the catalogue.

    They stand beside imported ones, and lora select --by evaluation takes both. What the catalogue has is not measured
    again. Every answer is stored at once: a killed evaluation goes on where it was. An adapter that cannot be judged is
    named and left out. The scores are those of examples that may choose adapters: score the chosen ones on others.
    """
    screen, settings, prompting = listing.screen(), setup.load(), prompts.prompting()
    # Report a missing base or a faulty task before importing libraries, which takes seconds.
    base_of(settings)
    task, options = setup.task(settings), judging.of_eval

    from lora_cli.steps.opened_pool import open_pool
    from lora_cli.steps.select.pool_evaluation import adapters_of, evaluate_pool
    from lora_cli.steps.select.trial import PoolTrial

    with screen.progress() as progress, open_pool(settings, screen.say, progress) as pool:
        names = adapters_of(
            pool.catalogue,
            base=settings.base,
            where=where or (),
            selection=selection,
            sample=sample,
            seed=settings.seed,
        )
        with PoolTrial(pool, task, settings, options, prompting) as trial:
            screen.say(
                f"pool evaluate: {counted(len(names), 'adapter')}, {counted(len(task.examples), 'example')} of "
                f"{task.file.name}, {options.metric}; base {settings.base}"
            )
            done = evaluate_pool(trial, names, k=k, race=race)
    rows = [{"id": id, **score._asdict()} for id, score in [*done.scores.items()][:k]]
    better = METRICS.get(options.metric).better
    extra = {
        **trial.settings,
        "adapters": len(names),
        "scored": len(done.scores),
        "failed": trial.failed,
        "answers": done.found.asked,
        "answers_of_all": done.found.of,
        "base_score": None if trial.base is None else trial.base.value,
    }
    screen.rows("lora.pool.evaluate/1", _COLUMNS, rows, caption=f"{options.metric}, {better} is better", extra=extra)
    base = "" if trial.base is None else f" · base {trial.base.value:.3f}"
    failed = f" · {len(trial.failed):,} failed" if trial.failed else ""
    screen.say(
        f"pool evaluate: {counted(len(done.scores), 'adapter')} scored{base} · best {rows[0]['value']:.3f}{failed} · "
        f"{done.found.told}"
    )


def register(pool: typer.Typer) -> None:
    """Add `lora pool evaluate` to the commands of the pool."""
    pool.command(
        cls=Command,
        epilog=examples(
            "lora pool evaluate --data task.jsonl --metric nll",
            "lora pool evaluate --data task.jsonl --race -k 1",
            "lora pool evaluate --data task.jsonl --where 'rank<=8' --sample 2 --json",
        ),
    )(with_flags(evaluate))
