"""An export carried out: files written aside, read back by the program's own rule, compared, renamed into place."""

import math
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lora_cli.errors import Refused
from lora_cli.exports import Plan, Written
from lora_cli.files import open_regular
from lora_cli.formats.reader import Factors
from lora_cli.formats.run_record import Run, peak_bytes
from lora_cli.hashes import sha256_of
from lora_cli.outputs import demand_apart, whole_folder
from lora_cli.precision import EPSILON, spoken
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
        plan.write(partial, progress)
        with ThreadPoolExecutor(1) as other:
            hashes = {name: other.submit(_flushed, partial / name) for name in plan.files}
            errors = checked(plan, partial, progress)
            run.outputs.update({name: found.result() for name, found in hashes.items()})
        run.results.update(precision=spoken(plan.dtype), errors=errors, error=max(errors.values()))
        run.write(partial)
    return ExportReport(folder=folder, errors=errors, seconds=time.monotonic() - started, peak_bytes=peak_bytes())


def _flushed(file: Path) -> str:
    """The SHA-256 of a file, which the system has put on the disk."""
    with open_regular(file) as opened:
        os.fsync(opened.fileno())
    return sha256_of(file)


def checked(plan: Plan, folder: Path, progress: Progress) -> dict[str, float]:
    """The relative error of every module's update as the program reads it from the written files.

    Raises Refused for an error above that of the precision, and for an adapter whose update is zero everywhere.
    """
    source, errors, anything = plan.source, dict[str, float](), False
    limit = max(EXACT, 2 * EPSILON[plan.dtype])
    with plan.opened(folder) as read:
        for done, module in enumerate(source.modules):
            progress("checking what was written", done, len(source.modules))
            own = Written(source.adapter.numbers(module), source.adapter.scales[module])
            anything = anything or _acts(own)
            errors[module] = error_of(own, read(module))
            if not errors[module] <= limit:
                raise Refused(
                    f"{module}: {spoken(plan.dtype)} loses {errors[module]:.2g} of its update",
                    hint="choose a wider --dtype",
                )
    progress("checking what was written", len(source.modules), len(source.modules))
    if not anything:
        raise Refused(f"{source.id}: every update is zero, so it changes nothing", hint="leave it out")
    return errors


def _acts(one: Written) -> bool:
    return bool(one.scale) and bool(one.factors.B.any()) and bool(one.factors.A.any())


def error_of(own: Written, written: Written) -> float:
    """‖s'·B'·A' − s·B·A‖ / ‖s·B·A‖ in float64; 0 without arithmetic where the numbers are the same.

    With D = s'·B' − s·B and E = A' − A the difference is D·A + (s·B + D)·E, so that what rounding left is no difference
    of sums. Rows of D and columns of E that are zero take no arithmetic: fp16 holds most numbers of bf16 exactly.
    """
    rank = max(own.factors.A.shape[0], written.factors.A.shape[0])
    (b, a), (wb, wa) = (_padded(one.factors, rank) for one in (own, written))
    if own.scale != written.scale:
        b, wb = b.astype("f8") * own.scale, wb.astype("f8") * written.scale
    d, e = wb - b, wa - a
    rows, columns = d.any(1), e.any(0)
    if not (rows.any() or columns.any()):
        return 0.0
    d, near_d, e, near_e = (one.astype("f8") for one in (d[rows], b[rows], e[:, columns], a[:, columns]))
    b, a = b.astype("f8", copy=False), a.astype("f8", copy=False)
    b_square, a_square, d_square, crossed = b.T @ b, a @ a.T, d.T @ d, near_d.T @ d
    change = (d_square * a_square).sum()
    change += 2 * ((crossed.T + d_square) * (near_e @ e.T)).sum()
    change += ((b_square + crossed + crossed.T + d_square) * (e @ e.T)).sum()
    whole, changed = _root((b_square * a_square).sum()), _root(change)
    return changed / whole if whole else math.inf if changed else 0.0


def _padded(factors: Factors, rank: int) -> Factors:
    """The factors with zeros up to a rank."""
    (b, a), missing = factors, rank - factors.A.shape[0]
    return Factors(np.pad(b, ((0, 0), (0, missing))), np.pad(a, ((0, missing), (0, 0)))) if missing else factors


def _root(square: float) -> float:
    """The root of a square, of one below 0 by rounding 0; NaN where a number is not finite."""
    return math.sqrt(max(0.0, square)) if not math.isnan(square) else math.nan
