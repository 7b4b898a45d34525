"""An adapter becomes part of its base: a stream over the base's files, the update added in fp32, the loss measured."""

import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from lora_cli.algebra.lowrank import LowRank
from lora_cli.algebra.threads import in_order, one_thread_each
from lora_cli.errors import OutputError, Refused
from lora_cli.files import open_regular
from lora_cli.formats.base_files import CONFIG
from lora_cli.formats.checkpoint import INDEX, ShardWriter, as_tensor, blocks
from lora_cli.formats.header import TensorEntry
from lora_cli.formats.run_record import Run, peak_bytes
from lora_cli.names import layer_of
from lora_cli.outputs import demand_apart, whole_folder
from lora_cli.precision import dtype_name, in_config, torch_dtype
from lora_cli.records import Progress, silent
from lora_cli.steps.bake.plan import BakePlan, Piece, find_base, is_here, plan
from lora_cli.text import size

__all__ = ["TOO_MUCH", "BakePlan", "BakeReport", "Survival", "bake", "find_base", "is_here", "plan"]

T = TypeVar("T")

TOO_MUCH = 0.1
"""Warn where rounding loses a larger share of the update than this."""
_SPARE_ROOM = 1.05
_UPDATES_HELD = 4
# Entries per tile: a tile and the four buffers computed from it fit into the cache.
_TILE = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Survival:
    """How much of an update Δ survived the cast of W + Δ: squared norms of Δ and of (cast(W + Δ) − W) − Δ, and how
    many of the `entries` equal the cast of the base alone.
    """

    delta: float = 0.0
    error: float = 0.0
    same: int = 0
    entries: int = 0

    def __add__(self, other: "Survival") -> "Survival":
        return Survival(
            delta=self.delta + other.delta,
            error=self.error + other.error,
            same=self.same + other.same,
            entries=self.entries + other.entries,
        )

    @property
    def lost(self) -> float:
        """‖(cast(W + Δ) − W) − Δ‖ / ‖Δ‖, 0 where there is no update."""
        return math.sqrt(self.error / self.delta) if self.delta else 0.0

    @property
    def figures(self) -> dict[str, float]:
        """Norm of the update, relative error of what was applied, share of entries that did not change."""
        return {"norm": math.sqrt(self.delta), "lost": self.lost, "unchanged": self.same / max(self.entries, 1)}


@dataclass(frozen=True, slots=True, kw_only=True)
class BakeReport:
    """The result of a bake: the survival of each module (in natural order), of each layer, and over all."""

    folder: Path
    modules: Mapping[str, Survival]
    layers: Mapping[str, Survival]
    total: Survival
    seconds: float
    peak_bytes: int


def bake(plan: BakePlan, folder: Path, run: Run, *, replace: bool = False, progress: Progress = silent) -> BakeReport:
    """Carry out a plan: write the base's files with the update added, then rename the finished folder into place.

    Memory: one block of rows of one tensor, and the factors of one module, or its update if that is stored dense.

    Raises:
        Refused: the result does not fit its precision, or no entry of it differs from the base.
        OutputError: `folder` exists (and `replace` is false), touches base or adapter, or the disk is too small.
    """
    started = time.monotonic()
    demand_apart(folder, plan.inputs)
    demand_room(plan, folder)
    checkpoint, found = plan.base.checkpoint, dict[str, Survival]()
    with whole_folder(folder, replace=replace) as partial, one_thread_each() as workers:
        steps = _Steps(progress, sum(len(header.tensors) for header in checkpoint.headers.values()))
        for part in checkpoint.headers:
            run.outputs[part] = _write_part(plan, part, partial, found, steps, workers)
        _copy_beside(plan, partial)
        modules = {module: found[module] for module in plan.places}
        report = BakeReport(
            folder=folder,
            modules=modules,
            layers=_by_layer(modules),
            total=sum(modules.values(), Survival()),
            seconds=time.monotonic() - started,
            peak_bytes=peak_bytes(),
        )
        _demand_effect(plan, report.total)
        run.results.update(_results(plan, report))
        run.write(partial)
    return report


def demand_room(plan: BakePlan, folder: Path) -> None:
    """OutputError if the disk has too little room for the result."""
    place = folder.absolute().parent
    while not place.exists():
        place = place.parent
    free, need = shutil.disk_usage(place).free, plan.bytes * _SPARE_ROOM
    if need > free:
        raise OutputError(
            f"{size(need)} to write, {size(free)} free at {place}",
            hint="free some space, or choose a folder on another disk with -o",
        )


class _Steps:
    """Progress over tensors."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def next(self) -> None:
        self._done += 1
        self._progress("bake", self._done, self._total)


def _write_part(
    plan: BakePlan, part: str, folder: Path, found: dict[str, Survival], steps: _Steps, workers: int
) -> str:
    """Write one file of the base anew, record the survival of each module in it, and return the file's SHA-256."""
    header = plan.base.checkpoint.headers[part]
    dtypes = {entry.name: plan.stored_as(entry) for entry in header.tensors.values()}
    with (
        open_regular(plan.base.checkpoint.folder / part) as source,
        ShardWriter(folder / part, header, dtypes) as target,
    ):
        for entry in header.tensors.values():
            # Loading ignores a tensor in a file that the index does not name for it, so cast it only.
            pieces = plan.pieces.get(entry.name) if plan.base.checkpoint.tensors.get(entry.name) == part else None
            if pieces:
                _write_baked(plan, pieces, entry, source, target, found, workers)
            else:
                _write_cast(entry, dtypes[entry.name], source, target)
            steps.next()
    return target.sha256


def _write_baked(
    plan: BakePlan,
    pieces: Sequence[tuple[str, Piece]],
    entry: TensorEntry,
    source: BufferedReader,
    target: ShardWriter,
    found: dict[str, Survival],
    workers: int,
) -> None:
    """Write one tensor with the updates of its modules added, blocks of rows at a time, and record their survival."""
    columns = entry.shape[-1] if len(entry.shape) == 3 and len(pieces) > 1 else math.prod(entry.shape[1:])
    dtype = torch_dtype(plan.stored_as(entry))
    update_of = _oriented(plan, entry)

    def work(row: int, block: bytearray) -> tuple[Tensor, list[tuple[str, Survival]]]:
        weight = as_tensor(block, entry.dtype).view(-1, columns)
        baked, survived = weight.to(dtype), []
        for module, piece in pieces:
            begin, end = max(piece.at, row), min(piece.at + piece.rows, row + len(weight))
            if begin < end:
                first = piece.row + begin - piece.at
                here = slice(begin - row, end - row)
                update = rows_of(update_of(module, piece.transposed), slice(first, first + end - begin))
                baked[here], survival = add(weight[here], update, dtype)
                if not math.isfinite(survival.error):
                    raise _does_not_fit(module, weight, dtype)
                survived.append((module, survival))
        return baked, survived

    for baked, survived in in_order(work, blocks(source, entry, columns), workers, pending=2 * workers):
        target.write(_bytes(baked))
        for module, survival in survived:
            found[module] = found.get(module, Survival()) + survival


def _oriented(plan: BakePlan, entry: TensorEntry) -> Callable[[str, bool], LowRank | Tensor]:
    """Reads updates in the orientation and precision of a tensor's sum, and caches the last few."""
    # The sum is in fp32, or in the base's precision if that is wider.
    wide = torch.promote_types(torch_dtype(entry.dtype), torch.float32)

    def read(module: str, transposed: bool) -> LowRank | Tensor:
        update = plan.adapter.read(module, wide)
        if not transposed:
            return update
        return update.T if isinstance(update, Tensor) else LowRank(update.A.T, update.B.T)

    return lru_cache(maxsize=_UPDATES_HELD)(read)


def rows_of(update: LowRank | Tensor, rows: slice) -> LowRank | Tensor:
    """Some rows of an update."""
    return update[rows] if isinstance(update, Tensor) else LowRank(update.B[rows], update.A)


def add(weight: Tensor, update: LowRank | Tensor, dtype: torch.dtype) -> tuple[Tensor, Survival]:
    """cast(W + Δ) and the survival of Δ. `weight` is (rows, columns) as stored, the sum has the dtype of `update`."""
    rows, columns = weight.shape
    height = max(1, _TILE // columns)
    baked, found = torch.empty(weight.shape, dtype=dtype), Survival()
    wide = update.dtype if isinstance(update, Tensor) else update.A.dtype
    room = torch.empty(4, min(height, rows), columns, dtype=wide)
    for at in range(0, rows, height):
        tile = slice(at, at + height)
        found += _add_tile(weight[tile], rows_of(update, tile), baked[tile], room)
    return baked, found


def _add_tile(weight: Tensor, update: LowRank | Tensor, baked: Tensor, room: Tensor) -> Survival:
    """Fill `baked` with cast(W + Δ). All arithmetic is in place: fresh memory would cost more than the arithmetic."""
    delta, exact, total, back = room[:, : len(weight)]
    if isinstance(update, Tensor):
        delta.copy_(update)
    else:
        torch.mm(update.B, update.A, out=delta)
    torch.add(exact.copy_(weight), delta, out=total)
    baked.copy_(total)
    norm = _squared(delta)
    if baked.dtype == total.dtype:
        # No cast: the error of the sum is the remainder of two-sum (Knuth), exact in the sum's own precision.
        torch.sub(total, exact, out=back)
        error = exact.sub_(total.sub_(back)).add_(delta.sub_(back))
        changed = torch.ne(back, 0, out=total).sum()
    else:
        plain = exact if weight.dtype == baked.dtype else total.copy_(weight.to(baked.dtype))
        # Summing floats 0 and 1 is several times faster than counting bools.
        changed = torch.ne(back.copy_(baked), plain, out=total).sum()
        error = back.sub_(exact).sub_(delta)
    return Survival(delta=norm, error=_squared(error), same=weight.numel() - int(changed), entries=weight.numel())


def _squared(values: Tensor) -> float:
    flat = values.flatten()
    return float(flat @ flat)


def _does_not_fit(module: str, weight: Tensor, dtype: torch.dtype) -> Refused:
    if not torch.isfinite(weight).all():
        return Refused(f"{module}: NaN or Inf in the base's own weight", hint="download the base model again")
    return _overflow(module, dtype)


def _overflow(name: str, dtype: torch.dtype) -> Refused:
    return Refused(f"{name}: values overflow {dtype_name(dtype)}", hint="choose a wider --dtype")


def _write_cast(entry: TensorEntry, stored: str, source: BufferedReader, target: ShardWriter) -> None:
    """Write a tensor that the adapter does not touch: its bytes, or its values in another precision."""
    for _, block in blocks(source, entry, 1):
        if stored == entry.dtype:
            target.write(block)
            continue
        values = as_tensor(block, entry.dtype)
        cast = values.to(torch_dtype(stored))
        if not torch.equal(torch.isfinite(cast), torch.isfinite(values)):
            raise _overflow(entry.name, cast.dtype)
        target.write(_bytes(cast))


def _bytes(values: Tensor) -> memoryview:
    data: memoryview = values.flatten().view(torch.uint8).numpy().data
    return data


def _copy_beside(plan: BakePlan, folder: Path) -> None:
    """Copy the files beside the weights; configuration and index get the new dtype and size."""
    checkpoint = plan.base.checkpoint
    for file in checkpoint.beside:
        target = folder / file.relative_to(checkpoint.folder)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)
    if plan.dtype != "auto":
        _write_json(folder / CONFIG, _with_dtype(checkpoint.config, in_config(plan.dtype)))
    if checkpoint.index is not None:
        metadata = checkpoint.index.get("metadata")
        metadata = {**(metadata if isinstance(metadata, Mapping) else {}), "total_size": plan.bytes}
        _write_json(folder / INDEX, {**checkpoint.index, "metadata": metadata})


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The configuration with `dtype` as its precision and as that of every nested part."""
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]

    def changed(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {k: dtype if k in ("dtype", "torch_dtype") else changed(v) for k, v in value.items()}

    return {**changed(config), **dict.fromkeys(keys, dtype)}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _by_layer(modules: Mapping[str, Survival]) -> dict[str, Survival]:
    """Sums over the modules of each layer, named as in `_layer_or_module`."""
    layers: dict[str, Survival] = {}
    for module, survival in modules.items():
        layer = _layer_or_module(module)
        layers[layer] = layers.get(layer, Survival()) + survival
    return layers


def _layer_or_module(module: str) -> str:
    """`model.layers.7` of `model.layers.7.mlp.up_proj`; a module outside all layers itself."""
    layer = layer_of(module)
    return layer.name if layer else module


def _demand_effect(plan: BakePlan, total: Survival) -> None:
    if total.delta == 0:
        raise Refused(f"{plan.adapter.ref.id}: every update is zero, so it changes nothing", hint="leave it out")
    if total.same == total.entries:
        raise Refused(
            f"{plan.adapter.ref.id} is too small for {plan.precision}: none of {total.entries:,} weights would change",
            hint="bake with --dtype fp32, or keep the adapter",
        )


def _results(plan: BakePlan, report: BakeReport) -> dict[str, Any]:
    """The results in run.json: `Survival.figures` over all, by layer and by module."""
    count = Counter(map(_layer_or_module, report.modules))
    return {
        **report.total.figures,
        "precision": plan.precision,
        "layers": [{"layer": layer, "modules": count[layer], **s.figures} for layer, s in report.layers.items()],
        "modules": [{"module": module, **_place(plan, module), **s.figures} for module, s in report.modules.items()],
    }


def _place(plan: BakePlan, module: str) -> dict[str, Any]:
    """The tensor that a module's update was added to, the first of them where there are several."""
    first = plan.places[module][0]
    return {"tensor": first.tensor, "transposed": first.transposed}
