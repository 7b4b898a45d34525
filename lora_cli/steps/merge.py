"""Several adapters become one: a stream over modules, one method, one PEFT folder."""

import json
import math
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_cli.adapters.checks import WEIGHTS_NAME
from lora_cli.adapters.lowrank import LowRank, RankChoice, Reduced, reduce
from lora_cli.adapters.reader import OpenAdapter, all_modules
from lora_cli.adapters.store import sha256_of
from lora_cli.adapters.tiles import DeltaTiles
from lora_cli.adapters.writer import AdapterWriter, target_modules
from lora_cli.errors import OutputError, Refused, UsageError
from lora_cli.methods import MethodFolder
from lora_cli.outputs import whole_folder
from lora_cli.records import Coefficients, Progress, silent
from lora_cli.runs import RECORD_FILE, Run, record_text
from lora_cli.screen import percent, safe

METHODS = MethodFolder("lora_cli.merge_methods", "merge method")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
AUTO_RANK = 64
# Below this share of what the factors could add up to, a sum is rounding noise.
_CANCELLED = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class MergePlan:
    """A merge that passed every check which needs no weights.

    `adapters` and `weights` are in canonical order, whatever order they were given in. `coefficients`, when there are
    any, replace the weights: per adapter, or per rank of each adapter, module by module.
    """

    adapters: tuple[OpenAdapter, ...]
    weights: tuple[float, ...]
    method: str
    knobs: Mapping[str, Any]
    base: str
    modules: tuple[str, ...]
    rank: str = "auto"
    energy: float | None = None
    scaling: float = 1.0
    missing: str = "zero"
    dtype: str = "auto"
    coefficients: Coefficients | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the result besides the adapters themselves."""
        return {
            "method": self.method,
            "knobs": dict(self.knobs),
            "base": self.base,
            "weights": {a.ref.pinned: w for a, w in zip(self.adapters, self.weights, strict=True)},
            "rank": self.rank,
            "energy": self.energy,
            "lambda": self.scaling,
            "missing": self.missing,
            "dtype": self.dtype,
            "coefficients": self.coefficients is not None,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleReport:
    """What became of one module: its rank, the norm of the merged update and the share of its energy that was kept."""

    module: str
    rank: int
    norm: float
    energy: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReport:
    """What a merge did. `energy` is the kept share of the squared Frobenius norm over all modules."""

    folder: Path
    modules: tuple[ModuleReport, ...]
    energy: float
    norm: float
    sha256: str
    seconds: float
    peak_bytes: int

    @property
    def ranks(self) -> tuple[int, int]:
        """Lowest and highest rank of the result."""
        ranks = [module.rank for module in self.modules]
        return min(ranks), max(ranks)


def plan(
    adapters: Sequence[OpenAdapter],
    weights: Sequence[float],
    *,
    base: str,
    method: str = "linear",
    knobs: Mapping[str, Any] | None = None,
    rank: str = "auto",
    energy: float | None = None,
    scaling: float = 1.0,
    missing: str = "zero",
    dtype: str = "auto",
    coefficients: Coefficients | None = None,
) -> MergePlan:
    """Check everything that can be checked before a weight is read.

    Args:
        weights: one per adapter.
        base: the base model that all adapters were found to belong to, as the result will declare it.
        rank: a number, "sum" (exact) or "auto" (up to 64, or the largest rank among the adapters if that is more).
        missing: "zero" counts an adapter as a zero update in modules it lacks; "renorm" spreads its weight over the
            others there.

    Raises:
        UsageError: an unknown method, knob, rank or dtype.
        Refused: shapes that contradict each other, an adapter given twice, weights that are not finite.
    """
    checked = METHODS.check(method, knobs or {})
    if missing not in ("zero", "renorm"):
        raise UsageError(f"--missing is zero or renorm, not {missing!r}")
    if dtype != "auto" and dtype not in DTYPES:
        raise UsageError(f"--dtype is auto, {', '.join(DTYPES)}, not {dtype!r}")
    if METHODS.get(method).kind == "concatenation":
        if rank not in ("auto", "sum") or energy is not None:
            raise UsageError(f"{method} keeps every rank", hint="use --method linear to reduce the rank")
        rank = "sum"
    _rank_choice(rank, energy, [1])
    if not all(math.isfinite(w) for w in [*weights, scaling]):
        raise UsageError("weights must be finite numbers")
    order = sorted(range(len(adapters)), key=lambda i: (adapters[i].ref.commit, adapters[i].ref.id))
    ordered = tuple(adapters[i] for i in order)
    for one, other in pairwise(ordered):
        if one.ref.commit == other.ref.commit and one.ref.id == other.ref.id:
            raise Refused(f"{one.ref.id} is given twice", hint="give it once, with the sum of the weights")
    modules = tuple(all_modules(ordered))
    _check_shapes(ordered, modules)
    if missing == "renorm" and coefficients is None and abs(sum(weights)) < 1e-12:
        raise Refused("weights sum to zero, so --missing renorm has nothing to spread them by")
    return MergePlan(
        adapters=ordered,
        weights=tuple(float(weights[i]) for i in order),
        method=method,
        knobs=checked,
        base=base,
        modules=modules,
        rank=rank,
        energy=energy,
        scaling=scaling,
        missing=missing,
        dtype=dtype,
        coefficients=coefficients,
    )


def merge(
    plan: MergePlan, folder: Path, run: Run, *, replace: bool = False, progress: Progress = silent
) -> MergeReport:
    """Carry out a plan: read, merge and write module by module, then rename the finished folder into place.

    Raises:
        Refused: an adapter holds NaN or Inf, an adapter or the result changes nothing at all, or the result does not
            fit its precision.
        OutputError: `folder` exists (and `replace` is false), cannot be written, or is one of the adapters.
    """
    started = time.monotonic()
    if folder.resolve() in {adapter.files.weights.parent.resolve() for adapter in plan.adapters}:
        raise OutputError(f"{folder}: one of the adapters to be merged", hint="choose another folder with -o")
    with whole_folder(folder, replace=replace) as partial:
        with AdapterWriter(partial, plan.modules, _dtype(plan)) as writer:
            reports, kept, total = _write_modules(plan, writer, progress)
            writer.finish(_config(plan))
        sha256 = sha256_of(partial / WEIGHTS_NAME)
        report = MergeReport(
            folder=folder,
            modules=tuple(reports),
            energy=_share(kept, total),
            norm=math.sqrt(kept),
            sha256=sha256,
            seconds=time.monotonic() - started,
            peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        )
        run.outputs[WEIGHTS_NAME] = sha256
        run.results.update(
            energy=report.energy,
            norm=report.norm,
            modules={m.module: {"rank": m.rank, "norm": m.norm, "energy": m.energy} for m in reports},
        )
        (partial / RECORD_FILE).write_text(record_text(run.record()), encoding="utf-8")
        (partial / "README.md").write_text(_card(plan, report), encoding="utf-8")
    return report


def _write_modules(
    plan: MergePlan, writer: AdapterWriter, progress: Progress
) -> tuple[list[ModuleReport], float, float]:
    """Merge and write every module; also the squared norms of the whole result, kept and before reduction."""
    reports, kept, total = [], 0.0, 0.0
    checks = _Effect({adapter.ref.id: False for adapter in plan.adapters})
    for done, module in enumerate(plan.modules):
        progress("merge", done, len(plan.modules))
        reduced = merge_module(plan, module, checks)
        writer.add(module, reduced.update)
        kept, total = kept + reduced.kept, total + reduced.total
        reports.append(
            ModuleReport(
                module=module,
                rank=writer.ranks[module],
                norm=math.sqrt(reduced.kept),
                energy=_share(reduced.kept, reduced.total),
            )
        )
    progress("merge", len(plan.modules), len(plan.modules))
    if still := [name for name, moves in checks.moves.items() if not moves]:
        raise Refused(f"{', '.join(still)}: every lora_B is zero, so it changes nothing", hint="leave it out")
    if total <= _CANCELLED * checks.largest:
        raise Refused("the merged update is zero: the weights are zero or cancel each other", hint="change the weights")
    return reports, kept, total


@dataclass(slots=True)
class _Effect:
    """Whether there is anything to a merge: which adapters move at all, and how large their sum could have been."""

    moves: dict[str, bool]
    largest: float = 0.0

    def see(self, adapter: OpenAdapter, update: LowRank, weight: float) -> None:
        b, a = (float(torch.linalg.vector_norm(factor)) ** 2 for factor in (update.B, update.A))
        self.moves[adapter.ref.id] |= b > 0 and a > 0
        self.largest += weight**2 * b * a


def merge_module(plan: MergePlan, module: str, effect: _Effect | None = None) -> Reduced:
    """The merged update of one module, at the rank the plan asks for.

    Args:
        effect: is shown every adapter's update and weight.
    """
    updates, weights = [], []
    for i, adapter in enumerate(plan.adapters):
        if module not in adapter.modules:
            continue
        update = adapter.read(module)
        if plan.coefficients is not None:
            update, weight = _with_coefficients(update, plan.coefficients, module, adapter)
        else:
            weight = plan.weights[i]
        if effect is not None:
            effect.see(adapter, update, weight)
        updates.append(update)
        weights.append(weight)
    if plan.missing == "renorm" and plan.coefficients is None:
        present = sum(weights)
        if abs(present) < 1e-12:
            raise Refused(f"{module}: the weights of the adapters that have it sum to zero", hint="use --missing zero")
        weights = [w * sum(plan.weights) / present for w in weights]
    merged = _apply(plan, updates, torch.tensor(weights, dtype=torch.float64))
    choice = _rank_choice(plan.rank, plan.energy, [update.rank for update in updates])
    # One adapter alone has nothing to be reduced to: it comes back as it is.
    alone = isinstance(merged, LowRank) and len(updates) == 1 and plan.rank == "auto" and plan.energy is None
    reduced = reduce(merged, RankChoice(exact=True) if alone else choice)
    return Reduced(reduced.update.scaled(plan.scaling), reduced.total * plan.scaling**2, reduced.kept * plan.scaling**2)


def _share(kept: float, total: float) -> float:
    return min(1.0, kept / total) if total else 1.0


def _apply(plan: MergePlan, updates: list[LowRank], weights: Tensor) -> LowRank | Tensor:
    function = METHODS.load(plan.method)
    if METHODS.get(plan.method).kind == "elementwise":
        with one_thread_each() as workers:
            dense: Tensor = function(DeltaTiles(updates, workers=workers), weights, **plan.knobs)
        return dense
    merged: LowRank = function(updates, weights, **plan.knobs)
    return merged


@contextmanager
def one_thread_each() -> Iterator[int]:
    """torch on one thread, and how many workers may use it instead: over blocks that fit a cache, threads inside each
    operation wait for each other more than they work, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def _with_coefficients(
    update: LowRank, coefficients: Coefficients, module: str, adapter: OpenAdapter
) -> tuple[LowRank, float]:
    values = coefficients.values[module][coefficients.adapters.index(adapter.ref.pinned)]
    if len(values) == 1:
        return update, values[0]
    return LowRank(update.B * update.B.new_tensor(values), update.A), 1.0


def _rank_choice(rank: str, energy: float | None, ranks: Sequence[int]) -> RankChoice:
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(f"--energy lies in 0 < energy <= 1, not {energy}")
    if rank == "sum":
        return RankChoice(ceiling=sum(ranks), energy=energy, exact=energy is None)
    if rank == "auto":
        return RankChoice(ceiling=max(AUTO_RANK, *ranks) if energy is None else None, energy=energy)
    if not rank.isdecimal() or int(rank) == 0:
        raise UsageError(f"--rank is a number above 0, sum or auto, not {rank!r}")
    return RankChoice(ceiling=int(rank), energy=energy)


def _check_shapes(adapters: Sequence[OpenAdapter], modules: Sequence[str]) -> None:
    for module in modules:
        shapes: dict[tuple[int, int], str] = {}
        for adapter in adapters:
            if factors := adapter.modules.get(module):
                shapes.setdefault((factors.out_features, factors.in_features), adapter.ref.id)
        if len(shapes) > 1:
            (one, first), (other, second) = list(shapes.items())[:2]
            raise Refused(
                f"{module} is {one[0]}×{one[1]} in {first} but {other[0]}×{other[1]} in {second}",
                hint="these adapters belong to different base models",
            )
    transposed = {adapter.config.fan_in_fan_out for adapter in adapters}
    if len(transposed) > 1:
        raise Refused("fan_in_fan_out is true in some of the adapters and false in others")


def _dtype(plan: MergePlan) -> torch.dtype:
    if plan.dtype != "auto":
        return DTYPES[plan.dtype]
    found = set().union(*(adapter.dtypes for adapter in plan.adapters))
    return found.pop() if len(found) == 1 and found <= set(DTYPES.values()) else torch.float32


def _config(plan: MergePlan) -> dict[str, Any]:
    first = plan.adapters[0].config
    tasks = {adapter.config.task_type for adapter in plan.adapters}
    return {
        "base_model_name_or_path": plan.base,
        "fan_in_fan_out": first.fan_in_fan_out,
        "task_type": tasks.pop() if len(tasks) == 1 else None,
        "target_modules": target_modules(plan.modules, whole=_covers_whole_base(plan)),
    }


def _covers_whole_base(plan: MergePlan) -> bool:
    """True when every adapter touches all modules of the base that its plain target names can mean.

    Then the union's names mean in PEFT exactly the union's modules; a restriction to some layers would be lost.
    """
    by_name: dict[str, set[str]] = {}
    for module in plan.modules:
        by_name.setdefault(module.rpartition(".")[2], set()).add(module)
    for adapter in plan.adapters:
        config = adapter.config
        if isinstance(config.target_modules, str) or config.layers_to_transform or config.exclude_modules:
            return False
        for name in {module.rpartition(".")[2] for module in adapter.modules}:
            if name not in config.target_modules or not by_name[name] <= adapter.modules.keys():
                return False
    return True


def _card(plan: MergePlan, report: MergeReport) -> str:
    """The model card: front matter the Hub reads, and every parent at its commit with its weight."""
    base = _code(plan.base)
    front = {
        "base_model": plan.base,
        "library_name": "peft",
        "tags": ["lora", "merge", f"base_model:adapter:{plan.base}"],
    }
    low, high = report.ranks
    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in front.items()),
        "---",
        "",
        "# Merged LoRA",
        "",
        f"{len(plan.adapters)} adapters of {base} merged by `{plan.method}`"
        + (f" ({', '.join(f'{k} {v}' for k, v in plan.knobs.items())})" if plan.knobs else "")
        + f": {len(report.modules)} modules, rank {low if low == high else f'{low} to {high}'}, "
        f"{percent(report.energy)} of the energy of the merged update kept.",
        "",
        "| parent | commit | weight |",
        "|---|---|---|",
    ]
    for adapter, weight in zip(plan.adapters, plan.weights, strict=True):
        shown = "learnt, see run.json" if plan.coefficients is not None else f"{weight:g}"
        lines.append(f"| {_code(adapter.ref.id)} | `{adapter.ref.commit}` | {shown} |")
    lines += ["", "`run.json` holds the settings, versions and hashes that made this folder.", ""]
    return "\n".join(lines)


def _code(text: str) -> str:
    """A stranger's text as a code span that it cannot leave."""
    return "`" + safe(text).replace("`", "'").replace("|", "/") + "`"
