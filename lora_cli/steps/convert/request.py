"""From the user's request for a conversion to a job that is ready to run."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lora_cli.errors import OutputError, UsageError
from lora_cli.formats.kinds import CONFIG_NAME, WEIGHTS_NAME
from lora_cli.formats.run_record import Run, peak_bytes
from lora_cli.hashes import sha256_of
from lora_cli.imports import Asked, Found, after, demand
from lora_cli.imports._written import Conversion, Converted, write
from lora_cli.outputs import demand_apart, whole_folder
from lora_cli.precision import dtype_name
from lora_cli.records import Progress, patient, silent, unheard
from lora_cli.settings import Settings
from lora_cli.steps.bases import config_here, look_here
from lora_cli.steps.convert.weights import weights_of_base
from lora_cli.steps.recorded import Finished, Job, run_once


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertReport:
    """What a conversion did: each module as it was written, the time in seconds and the peak of memory in bytes."""

    modules: Mapping[str, Converted]
    seconds: float
    peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertJob:
    """A conversion that is checked as far as that needs no weights."""

    found: Found
    conversion: Conversion
    job: Job

    def run(self, db: Path, *, force: bool = False, progress: Progress = silent) -> Finished[ConvertReport]:
        """Convert, unless the result is there; see `run_once`. Raises as `write` does."""

        def work(run: Run) -> ConvertReport:
            return _convert(self, run, replace=force, progress=progress)

        return run_once(db, self.job, work, force=force, progress=progress)


def convert_job(
    source: Path,
    settings: Settings,
    *,
    rank: int | None = None,
    dtype: str = "auto",
    adapter: str = "",
    out: Path | None = None,
    announce: Callable[[str], None] = unheard,
    progress: Progress = silent,
) -> ConvertJob:
    """The conversion of the foreign adapter in a folder or a file.

    Args:
        source: the folder or the file.
        rank: the highest rank that may come out; None for all ranks.
        dtype: the precision on disk, "auto" for that of the file.
        adapter: the name of one of several adapters in a file.
        announce: called with a line about each download of the base, whose weights some adapters need.

    Raises:
        UsageError: a rank below 1. NothingMatched: no such file, folder or base.
        Refused: no foreign adapter, or one that PEFT cannot represent; with the remedy.
        AccessDenied, NetworkError: the base cannot be downloaded.
    """
    if rank is not None and rank < 1:
        raise UsageError(f"--rank must be at least 1, not {rank}")
    found = demand(source)
    if adapter and not found.by.several:
        raise UsageError(f"--adapter cannot be used: {found.by.program} holds one adapter")
    base = settings.base or ""
    weights = partial(weights_of_base, base, announce=announce, progress=progress) if base and rank else None
    asked = Asked(base, config_here(base) if base else None, adapter, look_here(base), weights)
    with after(str(source)):
        foreign = found.open(asked)
        conversion = Conversion(foreign=foreign, rank=rank, dtype=dtype)
        with found.named():
            conversion.demand_low_rank()
    if foreign.copied and (rank is not None or dtype != "auto"):
        raise UsageError(
            f"{foreign.kind} is copied as it is: --rank and --dtype cannot be used",
            hint="convert it first, then lora merge CONVERTED=1 --rank R",
        )
    said: dict[str, Any] = {"kind": foreign.kind, "base": foreign.base, "dtype": dtype}
    said |= {"rank": rank} if rank is not None else {}
    said |= {"adapter": adapter} if adapter else {}
    inputs = {file.name: sha256_of(file, patient(progress)) for file in found.files}
    inputs |= foreign.weights.inputs if foreign.weights is not None else {}
    job = Job(verb="convert", settings=said, inputs=inputs, runs=settings.runs, out=out)
    _demand_apart(found, job.folder)
    if foreign.weights is not None:
        demand_apart(job.folder, [("base", foreign.weights.folder)])
    return ConvertJob(found=found, conversion=conversion, job=job)


def _demand_apart(found: Found, folder: Path) -> None:
    """OutputError for an output that is, contains or lies in the folder of the adapter."""
    out, place = folder.resolve(), found.place.folder.resolve()
    if out == place or place.is_relative_to(out) or (not found.place.one and out.is_relative_to(place)):
        raise OutputError(f"{folder}: that is where the adapter is", hint="choose another folder with -o")


def _convert(job: ConvertJob, run: Run, *, replace: bool, progress: Progress) -> ConvertReport:
    started = time.monotonic()
    conversion = job.conversion
    with whole_folder(job.job.folder, replace=replace) as partial:
        with after(str(job.found.place.path)), job.found.named():
            modules = write(conversion, partial, progress)
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            run.outputs[name] = sha256_of(partial / name, patient(progress))
        run.results.update(
            precision="" if conversion.foreign.copied else dtype_name(conversion.precision),
            exact=conversion.exact,
            modules={name: {"rank": one.rank, "error": one.error} for name, one in modules.items()},
            error=total_error(modules),
        )
        run.write(partial)
    return ConvertReport(modules=modules, seconds=time.monotonic() - started, peak_bytes=peak_bytes())


def total_error(modules: Mapping[str, Converted]) -> float:
    """‖ΔW − written‖ / ‖ΔW‖ over all modules."""
    total, kept = sum(one.total for one in modules.values()), sum(one.kept for one in modules.values())
    return Converted(rank=0, total=total, kept=kept).error
