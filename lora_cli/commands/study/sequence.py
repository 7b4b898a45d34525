"""The part of `lora study` for --sequence: tasks that come one after another."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_cli.columns import Column, on_request
from lora_cli.commands.study.placing import placed
from lora_cli.commands.study.shown import AMOUNTS, Found, amounts, estimated, say_outcome, say_plan
from lora_cli.errors import UsageError
from lora_cli.metrics import METRICS
from lora_cli.recipes import EvalOptions
from lora_cli.screen import Screen, near
from lora_cli.settings import Settings
from lora_cli.study_options import Asked, StudyOptions, listed
from lora_cli.text import counted

if TYPE_CHECKING:
    from lora_cli.commands.study import Execution
    from lora_cli.models.forms import Prompting
    from lora_cli.steps.study.sequence.estimate import SequenceEstimator
    from lora_cli.steps.study.sequence.folder import SequenceFolder
    from lora_cli.steps.study.sequence.plan import Cell
    from lora_cli.steps.study.sequence.request import PlannedSequence

_NOT_TAKEN = ("systems", "pools", "k", "where", "energy", "steps", "lr", "batch")
"""Options of a study that compares systems over pools."""
CELLS = (
    Column("CELL", "cell", wide=True),
    Column("STATE", "state"),
    *AMOUNTS,
    Column("NEEDS", "needs", minor=True, show=lambda row: ", ".join(row["needs"])),
    *on_request("rule", "seed", "step"),
)
MEASURES = (
    Column("RULE", "rule", wide=True, least=10),
    Column("FINAL", "final", "right", show=lambda row: f"{row['final']:.3f}"),
    Column("FORGETTING", "forgetting", "right", show=lambda row: f"{row['forgetting']:.3f}"),
    Column("BACKWARD", "backward_transfer", "right", show=lambda row: f"{row['backward_transfer']:+.3f}"),
    Column("BACKWARD/T", "backward_transfer_by_t", "right", show=lambda row: f"{row['backward_transfer_by_t']:+.3f}"),
    Column("FORWARD", "forward_transfer", "right", show=lambda row: f"{row['forward_transfer']:+.3f}"),
    Column("SEEDS", "seeds", "right", minor=True),
)


def sequence(
    screen: Screen, settings: Settings, options: StudyOptions, execution: "Execution", prompting: "Prompting"
) -> None:
    """Plan a sequence, do its cells, and show its measures."""
    from lora_cli.steps.study.run import demand_done, failures
    from lora_cli.steps.study.sequence.estimate import SequenceEstimator
    from lora_cli.steps.study.sequence.plan import shard_of
    from lora_cli.steps.study.sequence.request import SequenceRequest

    lora, recipe = options.target()
    request = SequenceRequest(
        tasks=[Path(name) for name in listed(options.sequence)],
        tests=[Path(name) for name in listed(options.sequence_test)],
        held_out=options.held_out,
        rules=options.rules,
        seeds=options.seeds,
        rank=options.rank,
        lora=lora,
        recipe=recipe,
        evaluation=_scored(options),
    )
    with screen.progress() as progress:
        planned = request.planned(settings, prompting, execution.out, announce=screen.say, progress=progress)
        cells = shard_of(planned.plan.cells(), execution.part)
        if execution.dry_run:
            with estimated(screen, lambda: SequenceEstimator(planned, settings)) as estimator:
                _show_cells(screen, planned, cells, estimator)
            return
        folder = planned.write()
        outcomes = placed(screen, folder, cells, execution, progress)
        if outcomes is None:
            return
        failed = failures(folder, outcomes, partial(say_outcome, screen))
    show_measures(screen, folder)
    demand_done(failed, len(cells))


def demand_fitting(asked: Asked, options: StudyOptions) -> None:
    """UsageError for options of a study that a sequence does not take, or the other way round."""
    if options.sequence:
        given = [name for name in _NOT_TAKEN if getattr(asked, name) not in (None, ())]
        if given:
            flag = f"-{given[0]}" if len(given[0]) == 1 else f"--{given[0]}"
            raise UsageError(f"--sequence takes no {flag}", hint="docs/sequence.md lists what it takes")
    elif options.sequence_test or getattr(asked, "rules", None) is not None:
        raise UsageError("--rules and --sequence-test need --sequence T1.jsonl,T2.jsonl")


def _scored(options: StudyOptions) -> EvalOptions:
    knobs = {name: getattr(options, name) for name in METRICS.get(options.metric).knobs}
    found: EvalOptions = EvalOptions.of(
        metric=options.metric, max_new_tokens=options.max_new_tokens, batch_size=options.batch_size, **knobs
    )
    return found


def _show_cells(
    screen: Screen, planned: "PlannedSequence", cells: "Sequence[Cell]", estimator: "SequenceEstimator | None"
) -> None:
    """The cells of a plan, what is there of each, and its minutes and memory if estimated."""
    folder, done = planned.folder, planned.folder.done(cells)
    rows: list[dict[str, Any]] = [
        {
            "cell": cell.name,
            "rule": cell.rule,
            "seed": cell.seed,
            "step": cell.step,
            "needs": [*cell.needs],
            "state": "done" if cell.name in done else "failed" if folder.failure(cell.name) else "open",
            **amounts(None if estimator is None else estimator.cell(cell)),
        }
        for cell in cells
    ]
    screen.rows("lora.sequence.plan/1", CELLS, rows, identity="cell", extra={"out": str(folder.path)})
    left = [row for row in rows if row["state"] != "done"] if estimator is not None else None
    say_plan(screen, folder.path, len(cells), len(done), left)


def show_measures(screen: Screen, folder: "SequenceFolder") -> Found:
    """The measures of each rule so far, as means over seeds."""
    from lora_cli.steps.study.sequence.table import PICTURE, TABLE_FILE, write_table

    table, count = write_table(folder), len(folder.plan.cells())
    metric = METRICS.get(table.metric)
    screen.rows(
        "lora.sequence/1",
        MEASURES,
        table.rows(),
        identity="rule",
        caption=f"{metric.name}, {metric.better} is better, {counted(len(table.tasks), 'task')}, means over seeds",
        extra={
            "out": str(folder.path),
            "table": str(folder.path / TABLE_FILE),
            "metric": metric.name,
            "tasks": [*table.tasks],
            "a": {rule: table.mean(rule)[0] for rule, runs in table.runs.items() if runs},
            "cells": count,
            "done": count - len(table.missing),
        },
    )
    done, made = f"{count - len(table.missing):,} of {counted(count, 'cell')} done", [folder.path / TABLE_FILE]
    made += [folder.path / PICTURE] if any(table.runs.values()) else []
    screen.say(", ".join([f"study: {done}", *map(near, made)]))
    return Found(count, len(table.missing), [name for name in table.missing if folder.failure(name)])
