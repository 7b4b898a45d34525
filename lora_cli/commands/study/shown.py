"""What the commands of a study show: cells as they end, and the table of its results."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_cli.columns import Column, on_request
from lora_cli.metrics import METRICS
from lora_cli.screen import Screen, near
from lora_cli.text import counted, difference, duration, interval

if TYPE_CHECKING:
    from lora_cli.scores import Difference
    from lora_cli.steps.study.collect import Collected
    from lora_cli.steps.study.plan import Cell
    from lora_cli.steps.study.request import Planned
    from lora_cli.steps.study.table import Line
    from lora_cli.steps.study.work import Outcome

CELLS = (
    Column("CELL", "cell", wide=True),
    Column("STATE", "state"),
    Column("NEEDS", "needs", show=lambda row: ", ".join(row["needs"])),
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
    *on_request("low", "high", "n", "wins", "losses"),
    *on_request(*(f"{name}_{part}" for name in ("base", "target", "noise") for part in ("delta", "low", "high", "p"))),
)


def says(screen: Screen) -> Callable[["Outcome"], "Outcome"]:
    """A function that says what became of a cell, and passes it on."""

    def say(outcome: "Outcome") -> "Outcome":
        if outcome.error:
            screen.warn(f"{outcome.name}: {outcome.error}")
        else:
            screen.say(f"study: {outcome.name}, {duration(outcome.seconds)}")
        return outcome

    return say


def show_cells(screen: Screen, planned: "Planned", cells: "Sequence[Cell]") -> None:
    """The cells of a plan, and what is there of each."""
    done = planned.folder.done(cells)
    rows = [
        {
            "cell": cell.name,
            "system": cell.system,
            "pool": cell.pool,
            "seed": cell.seed,
            "needs": [*cell.needs],
            "state": "done" if cell.name in done else "failed" if planned.folder.failure(cell.name) else "open",
        }
        for cell in cells
    ]
    folder = str(planned.folder.path)
    screen.rows("lora.study.plan/1", CELLS, rows, identity="cell", extra={"out": folder})
    screen.say(f"study: {counted(len(cells), 'cell')} in {near(planned.folder.path)}, {len(done):,} done")


def show_table(screen: Screen, collected: "Collected") -> None:
    """The results of a study so far."""
    from lora_cli.steps.study.table import lines

    folder = collected.folder
    metric = METRICS.get(folder.study.evaluation["metric"])
    found = lines(folder)
    count = found[0].n if found else 0
    screen.rows(
        "lora.study/1",
        LINES,
        [row_of(line) for line in found],
        identity="system",
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


def row_of(line: "Line") -> dict[str, Any]:
    """A line as data."""
    row: dict[str, Any] = {
        "system": line.system,
        "pool": line.pool,
        "seeds": len(line.cells),
        "n": line.n,
        "value": line.value,
        "low": line.low,
        "high": line.high,
        "wins": line.wins,
        "losses": line.losses,
    }
    for name in ("base", "target", "noise"):
        row |= _parts(name, line.against.get(name))
    return row


def _parts(name: str, one: "Difference | None") -> dict[str, float | None]:
    parts = ("delta", "low", "high", "p")
    return {f"{name}_{part}": None if one is None else getattr(one, part) for part in parts}


def _told(row: Mapping[str, Any], name: str) -> str | None:
    if row[f"{name}_delta"] is None:
        return None
    return difference(row[f"{name}_delta"], row[f"{name}_low"], row[f"{name}_high"])
