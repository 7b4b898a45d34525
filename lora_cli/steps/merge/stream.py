"""Several adapters become one: a stream over modules, one method, one PEFT folder."""

import json
import math
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_cli.algebra.lowrank import LowRank
from lora_cli.errors import OutputError, Refused
from lora_cli.formats.base_names import split_revision
from lora_cli.formats.card import write_card
from lora_cli.formats.delta import metadata, weight_of
from lora_cli.formats.facts import TASKS_WITH_A_HEAD
from lora_cli.formats.kinds import CONFIG_NAME, DENSE_FILE, WEIGHTS_NAME
from lora_cli.formats.run_record import Run, peak_bytes
from lora_cli.formats.skeleton import OWN
from lora_cli.formats.writer import AdapterWriter, Saved, TensorStream, base_entries
from lora_cli.hashes import sha256_of
from lora_cli.outputs import whole_folder
from lora_cli.precision import STORED, spoken
from lora_cli.records import Progress, patient, silent
from lora_cli.steps.merge.card import code, licence_of_all, stated
from lora_cli.steps.merge.lock import Lock, demand_same_outputs
from lora_cli.steps.merge.module import Effect, MergedModule, ModuleMerger
from lora_cli.steps.merge.plan import MergePlan, identical, plan
from lora_cli.steps.pool.licences import Stated, recorded_licences
from lora_cli.text import counted, percent

__all__ = ["MergePlan", "MergeReport", "ModuleReport", "identical", "merge", "plan"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleReport:
    """The result for one module: its own rank, the norm of the merged update and the share of its energy that was kept.

    In the files the module has the rank of the whole result, unless the result is compact.
    """

    module: str
    rank: int
    norm: float
    energy: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReport:
    """The result of a merge.

    `energy` is the kept share of the squared Frobenius norm over all modules; `mean_norm` the weighted mean of the
    adapters' own norms. `norm` is the result's: beside `mean_norm` it shows how much of the adapters the merge kept.
    """

    folder: Path
    modules: tuple[ModuleReport, ...]
    energy: float
    norm: float
    mean_norm: float
    sha256: str
    seconds: float
    peak_bytes: int

    @property
    def ranks(self) -> tuple[int, int]:
        """Lowest and highest rank of a module; the highest is the rank of the whole result, unless it is compact."""
        ranks = [module.rank for module in self.modules]
        return min(ranks), max(ranks)


def merge(
    plan: MergePlan,
    folder: Path,
    run: Run,
    *,
    replace: bool = False,
    lock: Lock | None = None,
    progress: Progress = silent,
) -> MergeReport:
    """Carry out a plan: read, merge and write module by module, then rename the finished folder into place.

    Args:
        lock: the lock of an earlier merge; the result must have the same bytes.

    Raises:
        Refused: an adapter holds NaN or Inf, an adapter or the result changes nothing at all, or the result does not
            fit its precision, or differs from the lock.
        OutputError: `folder` exists (and `replace` is false), cannot be written, or is one of the adapters.
    """
    started = time.monotonic()
    if any(adapter.folder.resolve().is_relative_to(folder.resolve()) for adapter in plan.adapters):
        raise OutputError(f"{folder} holds one of the adapters to be merged", hint="choose another folder with -o")
    with whole_folder(folder, replace=replace) as partial:
        merger = ModuleMerger(plan)
        reports, kept, total = (_write_dense if plan.options.dense else _write_factors)(merger, partial, progress)
        weights = DENSE_FILE if plan.options.dense else WEIGHTS_NAME
        sha256 = sha256_of(partial / weights, patient(progress))
        report = MergeReport(
            folder=folder,
            modules=tuple(reports),
            energy=_share(kept, total),
            norm=math.sqrt(kept),
            mean_norm=_mean_norm(plan, merger.effect),
            sha256=sha256,
            seconds=time.monotonic() - started,
            peak_bytes=peak_bytes(),
        )
        run.outputs[weights] = sha256
        if not plan.options.dense:
            run.outputs[CONFIG_NAME] = sha256_of(partial / CONFIG_NAME)
            run.results["rank"] = report.ranks[1]
        if lock is not None:
            demand_same_outputs(lock, run.outputs)
        run.results.update(
            licences=recorded_licences(plan.terms),
            energy=report.energy,
            norm=report.norm,
            mean_norm=report.mean_norm,
            card=write_card(partial, _card(plan, report)),
            modules={m.module: {"rank": m.rank, "norm": m.norm, "energy": m.energy} for m in reports},
        )
        run.write(partial)
    return report


def write_files(plan: MergePlan, folder: Path) -> None:
    """The two files of a merge in a folder, without a record of it, and also where it changes nothing."""
    with (
        closing(ModuleMerger(plan).each()) as results,
        AdapterWriter(folder, plan.layout, dtype_of(plan), _saved(plan)) as writer,
    ):
        for module, merged in results:
            assert isinstance(merged.update, LowRank)
            writer.add(module, merged.update)
        writer.finish(config_of(plan), compact=plan.options.compact)


def _write_factors(merger: ModuleMerger, folder: Path, progress: Progress) -> tuple[list[ModuleReport], float, float]:
    """Merge and write every module; also the squared norms of the whole result, kept and before reduction."""
    plan = merger.plan
    reports, kept, total = [], 0.0, 0.0
    with AdapterWriter(folder, plan.layout, dtype_of(plan), _saved(plan)) as writer:
        for module, merged in _merged(merger, progress):
            assert isinstance(merged.update, LowRank)
            writer.add(module, merged.update)
            kept, total = kept + merged.kept, total + merged.total
            share = _share(merged.kept, merged.total)
            reports.append(
                ModuleReport(module=module, rank=writer.ranks[module], norm=math.sqrt(merged.kept), energy=share)
            )
        _demand_effect(plan, merger.effect, writer.empty)
        writer.finish(config_of(plan), compact=plan.options.compact)
    return reports, kept, total


def _write_dense(merger: ModuleMerger, folder: Path, progress: Progress) -> tuple[list[ModuleReport], float, float]:
    """Merge and write every module's whole update, under the name of its weight."""
    plan = merger.plan
    reports, total = [], 0.0
    names = [weight_of(module) for module in plan.modules]
    says = metadata(fan_in_fan_out=plan.fan_in_fan_out)
    with TensorStream(folder / DENSE_FILE, names, dtype_of(plan), says) as stream:
        for module, merged in _merged(merger, progress):
            assert isinstance(merged.update, Tensor)
            stream.add(weight_of(module), merged.update)
            total += merged.total
            reports.append(
                ModuleReport(module=module, rank=min(merged.update.shape), norm=math.sqrt(merged.total), energy=1.0)
            )
        _demand_effect(plan, merger.effect, stream.empty)
        stream.finish()
    return reports, total, total


def _merged(merger: ModuleMerger, progress: Progress) -> Iterator[tuple[str, MergedModule]]:
    """Merge every module and report progress."""
    total = len(merger.plan.modules)
    progress("merge", 0, total)
    with closing(merger.each()) as results:
        for done, (module, merged) in enumerate(results, start=1):
            yield module, merged
            progress("merge", done, total)


def _demand_effect(plan: MergePlan, effect: Effect, empty: bool) -> None:
    """Refused if an adapter, the result, or (`empty`) the written result is zero."""
    if still := [adapter.ref.id for adapter in plan.adapters if effect.norm(adapter) == 0]:
        where = " in the scope" if plan.options.scope else ""
        raise Refused(
            f"{', '.join(still)}: no effect{where}, because lora_B or lora_alpha is zero",
            hint="leave out what has no effect",
        )
    if effect.cancelled:
        raise Refused(
            "the merged update is zero: weights are zero, or the updates cancel or have nothing in common",
            hint="change the weights or the method",
        )
    if empty:
        precision = spoken(dtype_of(plan))
        raise Refused(f"the merged update underflows to zero in {precision}", hint="write it with --dtype fp32")


def _mean_norm(plan: MergePlan, effect: Effect) -> float:
    """Mean of the adapters' norms, weighted by the size of their weights if these are numbers."""
    weights = [1.0 if plan.coefficients is not None else abs(w) for w in plan.weights]
    return sum(w * effect.norm(a) for w, a in zip(weights, plan.adapters, strict=True)) / (sum(weights) or 1.0)


def _share(kept: float, total: float) -> float:
    return min(1.0, kept / total) if total else 1.0


def dtype_of(plan: MergePlan) -> str:
    """The precision of the result as safetensors names it: the options', else the adapters' common one, else fp32."""
    if plan.options.dtype != "auto":
        return STORED[plan.options.dtype]
    found = set().union(*(adapter.dtypes for adapter in plan.adapters))
    return found.pop() if len(found) == 1 and found <= {*STORED.values()} else "F32"


def _saved(plan: MergePlan) -> Saved | None:
    return None if plan.saved is None else Saved(plan.saved.files.weights, plan.saved.stamp, plan.saved.saved)


def config_of(plan: MergePlan) -> dict[str, Any]:
    """The result's configuration of PEFT, but for ranks and alpha."""
    return {
        **base_entries(plan.base),
        "fan_in_fan_out": plan.fan_in_fan_out,
        "task_type": _task(plan),
        "modules_to_save": None if plan.saved is None else sorted(plan.saved.config.modules_to_save) or None,
        **plan.targets,
        **_class_of_all(plan),
    }


def _task(plan: MergePlan) -> str | None:
    """The task that the result declares, None for no task. It is declared only with the head that it needs."""
    from_whom = plan.adapters if plan.saved is None else [plan.saved]
    tasks = {adapter.config.task_type for adapter in from_whom}
    task = tasks.pop() if len(tasks) == 1 else ""
    return None if plan.saved is None and task in TASKS_WITH_A_HEAD else task or None


def _class_of_all(plan: MergePlan) -> dict[str, Any]:
    """The class that all adapters were trained on, in PEFT's format, if the result has that class's names."""
    classes = {adapter.config.trained_class for adapter in plan.adapters}
    name = classes.pop() if len(classes) == 1 and plan.spelling != OWN else ""
    mapping = {"base_model_class": name, "parent_library": "transformers"}
    return {"auto_mapping": mapping} if name.isidentifier() else {}


def rank_in_words(plan: MergePlan, report: MergeReport) -> str:
    """The rank of the files, and the lowest rank that was padded to it."""
    low, high = report.ranks
    if low == high:
        return f"rank {high}"
    return f"rank {low} to {high}" if plan.options.compact else f"rank {high}, padded with zeros from {low}"


def _card(plan: MergePlan, report: MergeReport) -> str:
    """The model card: front matter the Hub reads, and every parent at its commit with its weight."""
    name, revision = split_revision(plan.base)
    base = code(name) + (f" at revision {code(revision)}" if revision else "")
    parents = [plan.terms.get(adapter.ref.pinned, Stated()) for adapter in plan.adapters]
    front: dict[str, Any] = {"base_model": name, "tags": ["merge"], **licence_of_all(parents)}
    if datasets := sorted({dataset for one in parents for dataset in one.datasets}):
        front["datasets"] = datasets
    if plan.options.dense:
        title, made = "Merged update", f"whole updates, to be added to the base: `{DENSE_FILE}`"
    else:
        front |= {"library_name": "peft", "tags": ["lora", "merge", f"base_model:adapter:{name}"]}
        title = "Merged LoRA"
        made = f"{rank_in_words(plan, report)}, {percent(report.energy)} of the energy of the merged update kept"
    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in front.items()),
        "---",
        "",
        f"# {title}",
        "",
        f"{counted(len(plan.adapters), 'adapter')} of {base} merged by `{plan.options.method}`"
        + (f" ({', '.join(f'{k} {v}' for k, v in plan.options.knobs.items())})" if plan.options.knobs else "")
        + f": {counted(len(report.modules), 'module')}, {made}.",
        "",
        "| parent | commit | weight | licence |",
        "|---|---|---|---|",
    ]
    for adapter, weight, one in zip(plan.adapters, plan.weights, parents, strict=True):
        shown = "learnt, see run.json" if plan.coefficients is not None else f"{weight:g}"
        lines.append(f"| {code(adapter.ref.id)} | `{adapter.ref.commit}` | {shown} | {stated(one.licence)} |")
    if "" in plan.terms:
        lines += ["", f"Licence of the base: {stated(plan.terms[''].licence)}."]
    lines += ["", "`run.json` holds the settings, versions and hashes that made this folder.", ""]
    return "\n".join(lines)
