"""Run a planned study: its cells by an executor, recorded as one run, then its table."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from msgspec import to_builtins

from lora_cli.catalogue import runs
from lora_cli.errors import Partial
from lora_cli.records import Progress, silent
from lora_cli.steps.study.collect import Collected, collect
from lora_cli.steps.study.folder import Outcome, WorkFolder
from lora_cli.steps.study.plan import Cell
from lora_cli.steps.study.request import Planned
from lora_cli.text import counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """What became of some cells of a study: its table, those that failed, and how many were asked for."""

    collected: Collected
    failed: tuple[Outcome, ...]
    asked: int

    def demand_all(self) -> None:
        """Raise Partial for cells that failed; it names the first."""
        demand_done(self.failed, self.asked)


def demand_done(failed: Sequence[Outcome], asked: int) -> None:
    """Raise Partial for cells that failed, of so many that were asked for; it names the first."""
    if failed:
        raise Partial(
            f"{counted(len(failed), 'cell')} of {asked:,} failed, first {failed[0].name}: {failed[0].error}",
            hint=failed[0].hint or "run the same command again to try these cells again; done ones are kept",
        )


def failures(
    folder: WorkFolder, outcomes: Iterable[Outcome], told: Callable[[Outcome], None] = lambda outcome: None
) -> list[Outcome]:
    """The outcomes of cells that failed, each noted in its folder; `told` gets every outcome as it comes."""
    failed = []
    for outcome in outcomes:
        told(outcome)
        if outcome.error:
            failed.append(outcome)
            folder.note_failure(outcome.name, outcome.error, outcome.hint)
    return failed


def run_study(
    db: Path,
    planned: Planned,
    cells: Sequence[Cell],
    outcomes: Iterator[Outcome],
    *,
    told: Callable[[Outcome], None] = lambda outcome: None,
    progress: Progress = silent,
) -> Ran:
    """Do `cells` of a plan whose folder is written, and record the run in `db`.

    Args:
        outcomes: an executor at work: it yields the outcomes of those cells that have no result yet.
        told: gets the outcome of each cell as it ends.

    Raises:
        OutputError: the study's folder cannot be written.
        DataError: its data or its candidates are others than the plan's.
    """
    planned.folder.demand_unchanged()
    study = planned.study
    shared = dict(study.shared)
    inputs = {f"base:{shared['base']}@{shared['base_version']}": shared["base_version"]}
    inputs |= {name: shared[name] for name in ("data", "test")}
    described = {"systems": to_builtins(study.systems), "pools": to_builtins(study.pools), "cells": len(cells)}
    with runs.recorded(db, "study", {**shared, **described}, inputs, planned.folder.path) as run:
        run.device = shared["device"]
        failed = failures(planned.folder, outcomes, told)
        collected = collect([planned.folder.path], progress=progress)
        run.results |= {"done": collected.done, "failed": [one.name for one in failed]}
    return Ran(collected=collected, failed=tuple(failed), asked=len(cells))
