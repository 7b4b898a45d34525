"""What the commands of a study show: cells as they end, and the table of its results."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from lora_cli.columns import Column, on_request
from lora_cli.errors import NothingMatched
from lora_cli.metrics import METRICS
from lora_cli.records import Progress
from lora_cli.screen import Screen, near
from lora_cli.text import about, counted, difference, duration, interval, size

if TYPE_CHECKING:
    from lora_cli.steps.estimate import Estimate
    from lora_cli.steps.study.collect import Collected
    from lora_cli.steps.study.estimate import Estimator
    from lora_cli.steps.study.folder import Outcome
    from lora_cli.steps.study.plan import Cell
    from lora_cli.steps.study.request import Planned

AMOUNTS = (
    Column("MINUTES", "minutes", "right"),
    Column("MEMORY", "memory", "right", of="memory_bytes", show=lambda row: _size(row["memory_bytes"])),
)
_Within = TypeVar("_Within", bound=AbstractContextManager[Any])
CELLS = (
    Column("CELL", "cell", wide=True),
    Column("STATE", "state"),
    *AMOUNTS,
    Column("NEEDS", "needs", minor=True, show=lambda row: ", ".join(row["needs"])),
    *on_request("system", "pool", "seed"),
)
LINES = (
    Column("SYSTEM", "system", wide=True, least=14),
    Column("POOL", "pool"),
    Column("SCORE", "value", "right", show=lambda row: f"{row['value']:.3f}"),
    Column("95 % CI", "interval", "right", show=lambda row: interval(row["low"], row["high"])),
    Column("Δ BASE", "to_base", "right", of="base_delta", show=lambda row: _told(row, "base")),
    Column("Δ TARGET", "to_target", "right", of="target_delta", minor=True, show=lambda row: _told(row, "target")),
    Column("Δ NOISE", "to_noise", "right", of="noise_delta", minor=True, show=lambda row: _told(row, "noise")),
    Column("SEEDS", "seeds", "right", minor=True),
    *on_request("name", "low", "high", "n", "wins", "losses"),
    *on_request(*(f"{name}_{part}" for name in ("base", "target", "noise") for part in ("delta", "low", "high", "p"))),
)


class Found(NamedTuple):
    """The cells of a plan: how many there are, how many of them have no result, and those that failed."""

    planned: int
    missing: int
    failed: Sequence[str]


def say_outcome(screen: Screen, outcome: "Outcome") -> None:
    """Say what became of a cell."""
    if outcome.error:
        screen.warn(f"{outcome.name}: {outcome.error}")
    else:
        screen.say(f"study: {outcome.name}, {duration(outcome.seconds)}")


def show_cells(screen: Screen, planned: "Planned", cells: "Sequence[Cell]", estimator: "Estimator | None") -> None:
    """The cells of a plan and what they need, each with its state, and its minutes and memory if estimated."""
    done, folder = planned.folder.done(cells), planned.folder
    needs = planned.study.needs(cells)
    rows: list[dict[str, Any]] = [
        {
            "cell": cell.name,
            "system": cell.system,
            "pool": cell.pool,
            "seed": cell.seed,
            "needs": [*cell.needs],
            "state": "done" if cell.name in done else "failed" if folder.failure(cell.name) else "open",
            **amounts(None if estimator is None else estimator.cell(cell)),
        }
        for cell in cells
    ]
    shared: list[dict[str, Any]] = [
        {
            "need": need.name,
            "needs": [*need.needs],
            "state": "done" if folder.is_made(need.name) else "open",
            **amounts(None if estimator is None else estimator.need(need)),
        }
        for need in needs.values()
    ]
    screen.rows("lora.study.plan/1", CELLS, rows, identity="cell", extra={"out": str(folder.path), "shared": shared})
    left = [row for row in (*rows, *shared) if row["state"] != "done"] if estimator is not None else None
    say_plan(screen, folder.path, len(cells), len(done), left)


def say_plan(screen: Screen, path: Path, cells: int, done: int, left: Sequence[Mapping[str, Any]] | None) -> None:
    """Say how many cells there are, and what those that are `left` take if that was estimated."""
    said = f"study: {counted(cells, 'cell')} in {near(path)}, {done:,} done"
    if left is not None:
        seconds = 60 * sum(row["minutes"] for row in left)
        memory = max((row["memory_bytes"] for row in left), default=0)
        said += f"; what is left takes {about(seconds)} of one worker and {size(memory)} of memory"
    screen.say(said)


@contextmanager
def estimated(screen: Screen, estimator: Callable[[], _Within]) -> Iterator[_Within | None]:
    """What estimates the work of a plan, None where the base is not on this machine."""
    try:
        found = estimator()
    except NothingMatched as error:
        screen.say(error.message)
        yield None
        return
    with found:
        yield found


def amounts(needs: "Estimate | None") -> dict[str, float | int | None]:
    """Minutes and memory of some work, None where they are not known."""
    if needs is None:
        return {"minutes": None, "memory_bytes": None}
    return {"minutes": float(f"{needs.seconds / 60:.3g}"), "memory_bytes": needs.memory_bytes}


def show_table(screen: Screen, collected: "Collected") -> None:
    """The results of a study so far."""
    from lora_cli.steps.study.table import lines, row_of

    folder = collected.folder
    metric = METRICS.get(folder.study.evaluation["metric"])
    found = lines(folder)
    count = found[0].n if found else 0
    screen.rows(
        "lora.study/1",
        LINES,
        [row_of(line) for line in found],
        identity="name",
        caption=f"{metric.name}, {metric.better} is better, n = {count}, means over seeds, paired differences",
        extra={
            "out": str(folder.path),
            "table": str(collected.table),
            "metric": metric.name,
            "cells": collected.planned,
            "done": collected.done,
            "failed": [*collected.failed],
        },
    )
    screen.say(f"study: {collected.done:,} of {counted(collected.planned, 'cell')} done, {near(collected.table)}")


def show_collected(screen: Screen, paths: "Sequence[Path]", out: "Path | None", progress: Progress) -> "Found":
    """Bring the folders of a study or of a sequence together, and show what is there."""
    from lora_cli.steps.study.workers import is_sequence

    if is_sequence(paths[0]):
        from lora_cli.commands.study.sequence import show_measures
        from lora_cli.steps.study.sequence.collect import collect_sequence

        return show_measures(screen, collect_sequence(paths, out, progress=progress))
    from lora_cli.steps.study.collect import collect

    collected = collect(paths, out, progress=progress)
    show_table(screen, collected)
    return Found(collected.planned, collected.planned - collected.done, collected.failed)


def _told(row: Mapping[str, Any], name: str) -> str | None:
    if row[f"{name}_delta"] is None:
        return None
    return difference(row[f"{name}_delta"], row[f"{name}_low"], row[f"{name}_high"])


def _size(count: int | None) -> str | None:
    return None if count is None else size(count)
