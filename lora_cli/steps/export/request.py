"""From the user's request for an export to a job that is ready to run."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_cli.errors import Refused
from lora_cli.exports import Export, Plan, Source, export
from lora_cli.files import read_regular, unreadable
from lora_cli.formats.base_files import CONFIG
from lora_cli.formats.reader import OpenAdapter
from lora_cli.formats.run_record import Run
from lora_cli.formats.skeleton import OWN
from lora_cli.outputs import demand_apart
from lora_cli.records import Adapter, Progress, silent
from lora_cli.settings import Settings
from lora_cli.steps.bases import config_here
from lora_cli.steps.export.export import ExportReport
from lora_cli.steps.export.export import export as carried_out
from lora_cli.steps.merge.scope import modules_meant
from lora_cli.steps.opened_pool import Gathered, Pool
from lora_cli.steps.pool.licences import recorded_licences
from lora_cli.steps.recorded import Finished, Job, run_once


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportJob:
    """An export that is planned. `licences` are those of `recorded_licences`."""

    plan: Plan
    target: Export
    job: Job
    licences: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def run(self, db: Path, *, force: bool = False, progress: Progress = silent) -> Finished[ExportReport]:
        """Export, unless the result is there; see `run_once` and `steps.export.export`."""

        def work(run: Run) -> ExportReport:
            run.results["licences"] = dict(self.licences)
            return carried_out(self.plan, self.job.folder, run, replace=force, progress=progress)

        return run_once(db, self.job, work, force=force, progress=progress)


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """The user's request: one adapter, for the program called `target`."""

    pool: Pool
    target: str
    name: str
    settings: Settings

    def absent(self) -> list[Adapter]:
        """The adapter, if its weights would have to be downloaded."""
        return self.pool.absent([self.name])

    def prepare(self, *, dtype: str = "auto", called: str = "", out: Path | None = None) -> ExportJob:
        """Open the adapter and plan the files, downloading what is missing.

        Args:
            called: the base as the program calls it, "" for its own name.

        Raises:
            Refused: the program cannot hold the adapter; what it cannot hold, by name. Else as `Pool.adapters`.
        """
        target = export(self.target)

        def sure(adapter: OpenAdapter, base: str) -> bool:
            place = config_here(base)
            return place is not None and target.sure(adapter, config_of(place / CONFIG))

        found = self.pool.adapters([self.name], passed_on=True, sure=sure)
        source = source_of(found, self.settings.base, called)
        plan = target.plan(source, dtype)
        said: dict[str, Any] = {"for": self.target, "program": target.title, "base": found.base, "dtype": dtype}
        job = Job(
            verb="export",
            name=f"export-{self.target}",
            settings=said | ({"base_name": called} if called else {}),
            inputs=found.inputs,
            runs=self.settings.runs,
            out=out,
        )
        demand_apart(job.folder, [("adapter", source.adapter.folder)])
        notes = tuple(filter(None, [*plan.notes, found.unchecked, found.notice]))
        licences = recorded_licences(found.terms)
        return ExportJob(plan=plan, target=target, job=job, licences=licences, notes=notes)


def source_of(found: Gathered, base: str | None, called: str = "") -> Source:
    """The one adapter of `found`, with what is known of its base.

    Args:
        base: the base of the settings; None for the one that the adapter declares.
    """
    adapter = found.adapters[0]
    place = config_here(base or adapter.base or found.base)
    known = found.skeleton if adapter.spelling == OWN else None
    return Source(
        adapter=adapter,
        base=found.base,
        config={} if place is None else config_of(place / CONFIG),
        skeleton=found.skeleton,
        meant=modules_meant([*adapter.modules], [adapter], known),
        called=called,
    )


def config_of(path: Path) -> Mapping[str, Any]:
    """A base's configuration. DataError for one that cannot be read, Refused for one that is no JSON object."""
    try:
        config = json.loads(read_regular(path))
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        raise Refused(f"{path}: malformed JSON", hint="download the base model again") from error
    if not isinstance(config, dict):
        raise Refused(f"{path}: not a JSON object", hint="download the base model again")
    return config
