"""An export carried out: files written aside, read back by the program's own rule, compared, renamed into place."""

import math
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lora_cli.algebra.lowrank import LowRank, inner
from lora_cli.algebra.threads import one_thread_each
from lora_cli.errors import Refused
from lora_cli.exports import Plan, Written
from lora_cli.formats.run_record import Run, peak_bytes
from lora_cli.hashes import sha256_of
from lora_cli.outputs import demand_apart, whole_folder
from lora_cli.precision import dtype_name
from lora_cli.records import Progress, silent

EXACT = 1e-6
"""The largest relative error of an update that is written in fp32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """What was written: by module the relative error of its update as the program reads it, 0 for equal numbers."""

    folder: Path
    errors: Mapping[str, float]
    seconds: float
    peak_bytes: int


def export(plan: Plan, folder: Path, run: Run, *, replace: bool = False, progress: Progress = silent) -> ExportReport:
    """Carry out a plan. The folder is there as a whole, checked, or not at all.

    Raises:
        Refused: NaN, Inf or an overflow in the adapter, an update of zeros, files that changed, or a precision
            that does not hold the update.
        OutputError: `folder` exists (and `replace` is false) or cannot be written, or is the adapter's.
    """
    started = time.monotonic()
    demand_apart(folder, [("adapter", plan.source.adapter.folder)])
    with whole_folder(folder, replace=replace) as partial:
        with one_thread_each(), ThreadPoolExecutor(1) as hashing:
            plan.write(partial, progress)
            hashes = {name: hashing.submit(sha256_of, partial / name) for name in plan.files}
            errors = checked(plan, partial, progress)
            run.outputs.update({name: found.result() for name, found in hashes.items()})
        run.results.update(precision=dtype_name(plan.dtype), errors=errors, error=max(errors.values()))
        run.write(partial)
    return ExportReport(folder=folder, errors=errors, seconds=time.monotonic() - started, peak_bytes=peak_bytes())


def checked(plan: Plan, folder: Path, progress: Progress) -> dict[str, float]:
    """The relative error of every module's update as the program reads it from the written files.

    Raises Refused for an error above that of the precision, and for an adapter whose update is zero everywhere.
    """
    source, errors, anything = plan.source, dict[str, float](), False
    limit = max(EXACT, 2 * torch.finfo(plan.dtype).eps)
    with plan.opened(folder) as read:
        for done, module in enumerate(source.modules):
            progress("checking what was written", done, len(source.modules))
            own = Written(source.adapter.unscaled(module, source.precision), source.adapter.scales[module])
            anything = anything or _acts(own)
            errors[module] = error_of(own, read(module))
            if not errors[module] <= limit:
                raise Refused(
                    f"{module}: {dtype_name(plan.dtype)} loses {errors[module]:.2g} of its update",
                    hint="choose a wider --dtype",
                )
    progress("checking what was written", len(source.modules), len(source.modules))
    if not anything:
        raise Refused(f"{source.id}: every update is zero, so it changes nothing", hint="leave it out")
    return errors


def _acts(one: Written) -> bool:
    return bool(one.scale) and bool(one.factors.B.any()) and bool(one.factors.A.any())


def error_of(own: Written, written: Written) -> float:
    """‖s'·B'·A' − s·B·A‖ / ‖s·B·A‖ in float64; 0 without arithmetic where the numbers are the same."""
    (b, a), (wb, wa) = _factors(own), _factors(written)
    rank = min(a.shape[0], wa.shape[0])
    padded = wb[:, rank:].any() or b[:, rank:].any()
    same_a = not padded and _equal(a[:rank], wa[:rank])
    if same_a and own.scale == written.scale and _equal(b[:, :rank], wb[:, :rank]):
        return 0.0
    if same_a:
        change = LowRank(wb[:, :rank].double() * written.scale - b[:, :rank].double() * own.scale, a[:rank].double())
    else:
        sides = [wb.double() * written.scale, -b.double() * own.scale], [wa.double(), a.double()]
        change = LowRank(torch.cat(sides[0], 1), torch.cat(sides[1]))
    whole = float(own.factors.norm()) * abs(own.scale)
    changed = math.sqrt(max(0.0, float(inner(change, change))))
    return changed / whole if whole else math.inf if changed else 0.0


def _factors(one: Written) -> tuple[Tensor, Tensor]:
    return one.factors.B, one.factors.A


def _equal(one: Tensor, other: Tensor) -> bool:
    wide = torch.promote_types(one.dtype, other.dtype)
    return torch.equal(one.to(wide), other.to(wide))
