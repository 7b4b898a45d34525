"""From the user's request for a bake to a job that is ready to run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lora_cli.errors import UsageError
from lora_cli.formats.run_record import Run
from lora_cli.outputs import demand_apart
from lora_cli.records import Adapter, Progress, silent
from lora_cli.settings import Settings, base_of
from lora_cli.steps.bake.bake import BakePlan, BakeReport, bake, find_base, is_here, plan
from lora_cli.steps.bake.plan import Base
from lora_cli.steps.opened_pool import Pool
from lora_cli.steps.pool.licences import recorded_licences
from lora_cli.steps.recorded import Finished, Job, run_once


@dataclass(frozen=True, slots=True, kw_only=True)
class BakeJob:
    """A bake that is planned. `licences` are those of `recorded_licences`."""

    plan: BakePlan
    job: Job
    licences: Mapping[str, str] = field(default_factory=dict)
    notice: str = ""

    def run(self, db: Path, *, force: bool = False, progress: Progress = silent) -> Finished[BakeReport]:
        """Bake, unless the result is there; see `run_once` and `steps.bake.bake`."""

        def work(run: Run) -> BakeReport:
            run.results["licences"] = dict(self.licences)
            return bake(self.plan, self.job.folder, run, replace=force, progress=progress)

        return run_once(db, self.job, work, force=force, progress=progress)


@dataclass(frozen=True, slots=True)
class BakeRequest:
    """The user's request for a bake: one adapter, added to the base model of the settings."""

    pool: Pool
    name: str
    settings: Settings

    def absent(self) -> tuple[list[Adapter], str]:
        """The adapter and the base model that would have to be downloaded; "" for a base that is here."""
        base = self.settings.base
        if base is None:
            return [], ""
        return self.pool.absent([self.name]), "" if is_here(base) else str(base)

    def base(self, name: str = "") -> Base:
        """The base model, downloaded if it is not here. `name` is its name in records and messages."""
        model = base_of(self.settings)
        return find_base(model, name=name, announce=self.pool.announce, progress=self.pool.progress)

    def prepare(self, *, dtype: str = "auto", out: Path | None = None) -> BakeJob:
        """Open the adapter and the base, downloading missing files, and check everything that needs no weights.

        Raises:
            UsageError: no base model, or an unknown dtype. Else as `Pool.update`, `find_base` and `plan` do.
        """
        found = self.pool.update(self.name)
        update, name = found.adapter, found.base
        if self.settings.base is None:
            raise UsageError("no base model", hint=f"{update.ref.id} is for {name}: give --base, or set LORA_BASE")
        base = self.base(name)
        planned = plan(update, base, dtype=dtype)
        job = Job(
            verb="bake",
            settings=planned.settings,
            inputs={**base.inputs, **found.inputs},
            runs=self.settings.runs,
            out=out,
        )
        demand_apart(job.folder, planned.inputs)
        licences = recorded_licences(found.terms)
        return BakeJob(plan=planned, job=job, licences=licences, notice=found.notice)
