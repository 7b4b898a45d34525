"""An adapter becomes part of its base: a stream over the base's files, the update added in fp32, the loss measured."""

import json
import math
import resource
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_cli.adapters.checkpoint import (
    CONFIG,
    INDEX,
    Checkpoint,
    ShardWriter,
    as_tensor,
    blocks,
    cached_model,
    folder_or_hub,
    open_checkpoint,
    size_of,
    version_of_folder,
    wanted_files,
)
from lora_cli.adapters.checks import public_base
from lora_cli.adapters.header import FLOAT_DTYPES, TensorEntry
from lora_cli.adapters.reader import DTYPES, OpenAdapter, all_modules
from lora_cli.errors import OutputError, Refused, UsageError
from lora_cli.hub import Hub, cached_file
from lora_cli.outputs import whole_folder
from lora_cli.records import Progress, silent
from lora_cli.runs import RECORD_FILE, Run, record_text

PRECISIONS = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
TOO_MUCH = 0.1
"""A larger share of the update lost is worth a warning."""
_IN_CONFIG = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_SHORT = {stored: short for short, stored in PRECISIONS.items()}
_SPARE_ROOM = 1.05
# Models of transformers whose attention and MLP are Conv1D, which stores (in, out), and the names of these modules.
_CONV1D_MODELS = frozenset(("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"))
_CONV1D_MODULES = frozenset(("c_attn", "q_attn", "c_proj", "c_fc"))
_TIED_MODULES = frozenset(("lm_head", "embed_out"))


# ---- the base ----


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """A base model on this machine: what records call it, its version as `base_model.pin` has it, and its files."""

    name: str
    version: str
    checkpoint: Checkpoint

    @property
    def inputs(self) -> dict[str, str]:
        """Its part of a run's inputs."""
        return {f"base:{self.name}@{self.version}": self.version}


def is_here(model: str) -> bool:
    """False when `model` is a Hub id that would have to be downloaded. NothingMatched when it can be neither."""
    return folder_or_hub(model) is not None or cached_model(model) is not None


def find_base(model: str, *, name: str = "", announce: Callable[[str], None], progress: Progress = silent) -> Base:
    """The base in a folder or in the Hub client's cache, into which it is downloaded if it is not there.

    Args:
        model: a folder or a Hub id.
        name: what records and messages call it, where that is not `public_base(model)`.
        announce: is told what is downloaded, before it is.

    Raises:
        NothingMatched, AccessDenied, NetworkError: there is none, or it cannot be had.
        Refused: see `open_checkpoint`.
    """
    name = name or public_base(model)
    folder = folder_or_hub(model)
    if folder is not None:
        checkpoint = open_checkpoint(folder, name)
        return Base(name=name, version=version_of_folder(folder), checkpoint=checkpoint)
    cached = cached_model(model) or download_base(Hub(progress=progress), model, announce=announce, progress=progress)
    return Base(name=name, version=cached.name, checkpoint=open_checkpoint(cached, name))


def download_base(hub: Hub, repo: str, *, announce: Callable[[str], None], progress: Progress = silent) -> Path:
    """Bring a model into the Hub client's cache: its folder there, named by the commit."""
    # Asked for as main, so that the cache learns which commit that is and needs no network tomorrow.
    commit = hub.download(repo, CONFIG, "main").parent.name
    files = wanted_files(hub.repository(repo, commit).files)
    missing = [file for file in files if cached_file(repo, file, commit) is None]
    size = sum(hub.file_facts(repo, file, commit).size for file in missing)
    announce(f"fetching the base {repo}, {len(missing)} files, {size / 1e6:,.1f} MB")
    for done, file in enumerate(missing):
        progress("fetching the base", done, len(missing))
        hub.download(repo, file, commit)
    progress("fetching the base", len(missing), len(missing))
    config = cached_file(repo, CONFIG, commit)
    assert config is not None
    return config.parent


# ---- the plan ----


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a module's weight is: the tensor's name, and whether it is stored (in, out) and not (out, in)."""

    tensor: str
    transposed: bool


@dataclass(frozen=True, kw_only=True)
class BakePlan:
    """A bake that passed every check which needs no weights. `places` is by module; `note` says what was assumed."""

    adapter: OpenAdapter
    base: Base
    places: Mapping[str, Place]
    dtype: str
    note: str

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the result besides adapter and base."""
        return {"base": self.base.name, "dtype": self.dtype}

    @cached_property
    def modules(self) -> Mapping[str, str]:
        """Tensor → module."""
        return {place.tensor: module for module, place in self.places.items()}

    @property
    def precision(self) -> str:
        """Of the baked tensors, in words."""
        entries = [self.base.checkpoint.entry(place.tensor) for place in self.places.values()]
        return ", ".join(sorted({_SHORT.get(stored, stored.lower()) for stored in map(self.stored_as, entries)}))

    @property
    def bytes(self) -> int:
        """Of the tensors that will be written."""
        headers = self.base.checkpoint.headers.values()
        return sum(size_of(entry, self.stored_as(entry)) for header in headers for entry in header.tensors.values())

    def stored_as(self, entry: TensorEntry) -> str:
        """The dtype a tensor of the base is written in."""
        return entry.dtype if self.dtype == "auto" or entry.dtype not in FLOAT_DTYPES else PRECISIONS[self.dtype]


def plan(adapter: OpenAdapter, base: Base, *, dtype: str = "auto") -> BakePlan:
    """Check everything that can be checked before a weight is read.

    Args:
        dtype: fp32, bf16 or fp16 for every tensor of floats; "auto" leaves each as it is.

    Raises:
        UsageError: an unknown dtype.
        Refused: a module that the base does not have, has in another shape or type, or ties to its embedding.
    """
    if dtype not in ("auto", *PRECISIONS):
        raise UsageError(f"--dtype is auto, {', '.join(PRECISIONS)}, not {dtype!r}")
    checkpoint = base.checkpoint
    tensors = _present(adapter, base, weights_of(all_modules([adapter]), checkpoint.tensors))
    places: dict[str, Place] = {}
    assumed = []
    for module, tensor in tensors.items():
        entry, factors = checkpoint.entry(tensor), adapter.modules[module]
        shape = (factors.out_features, factors.in_features)
        if entry.dtype not in FLOAT_DTYPES:
            raise Refused(f"{module} is {entry.dtype} in {base.name}: an update is added to floats only")
        if entry.shape not in (shape, shape[::-1]):
            raise Refused(
                f"{module} is {_times(entry.shape)} in {base.name} and {_times(shape)} in {adapter.ref.id}",
                hint="use the adapter with the base model it was trained on",
            )
        square = shape[0] == shape[1]
        transposed = _is_conv1d(module, checkpoint, adapter) if square else entry.shape != shape
        if square and (transposed or adapter.config.fan_in_fan_out):
            assumed.append(transposed)
        places[module] = Place(tensor=tensor, transposed=transposed)
    return BakePlan(adapter=adapter, base=base, places=places, dtype=dtype, note=_note(assumed, checkpoint, adapter))


def weights_of(modules: Sequence[str], tensors: Collection[str]) -> dict[str, str | None]:
    """The tensor that is each module's weight: of its name, or of its name with the model's prefix taken off or put on.

    A checkpoint may have been saved from the model with its head (`transformer.h.0…`) or without (`h.0…`), and an
    adapter trained on either. None where there is no such tensor or more than one could be meant.
    """
    wanted = {f"{module}.weight" for module in modules}
    longer: dict[str, list[str]] = {}
    for tensor in tensors:
        parts = tensor.split(".")
        for cut in range(1, len(parts) - 1):
            if (ending := ".".join(parts[cut:])) in wanted:
                longer.setdefault(ending, []).append(tensor)
    found: dict[str, str | None] = {}
    for module in modules:
        exact = f"{module}.weight"
        candidates = [exact] if exact in tensors else longer.get(exact, []) + _shorter(module, tensors)
        found[module] = candidates[0] if len(candidates) == 1 else None
    return found


def _shorter(module: str, tensors: Collection[str]) -> list[str]:
    """The tensors of a module's name without its first parts; the list that holds the layers keeps its own name."""
    parts = module.split(".")
    layer = next((place for place, part in enumerate(parts) if part.isdecimal()), len(parts))
    names = [".".join([*parts[cut:], "weight"]) for cut in range(1, layer)]
    return [name for name in names if name in tensors]


def _present(adapter: OpenAdapter, base: Base, weights: Mapping[str, str | None]) -> dict[str, str]:
    """Module → tensor; Refused where a module has no weight of its own in the base's files."""
    tied = base.checkpoint.config.get("tie_word_embeddings")
    found: dict[str, str] = {}
    taken: dict[str, str] = {}
    for module, tensor in weights.items():
        if module.rpartition(".")[2] in _TIED_MODULES and (tied or (tensor is None and tied is None)):
            raise Refused(
                f"{adapter.ref.id} adapts {module}, whose weight in {base.name} is tied to the embedding",
                hint="keep the adapter: baking it would change the embedding too",
            )
        if tensor is None:
            matching = sum(name is not None for name in weights.values())
            raise Refused(
                f"{adapter.ref.id} does not fit {base.name}: no module {module}; "
                f"{matching} of {len(weights)} modules match",
                hint="use the adapter with the base model it was trained on",
            )
        if taken.setdefault(tensor, module) != module:
            raise Refused(f"{adapter.ref.id}: {taken[tensor]} and {module} are one weight in {base.name}")
        found[module] = tensor
    return found


def _is_conv1d(module: str, checkpoint: Checkpoint, adapter: OpenAdapter) -> bool:
    """Is a square weight stored (in, out)? The model decides, as in PEFT; where none is named, the adapter's flag."""
    model = checkpoint.config.get("model_type")
    if not model:
        return adapter.config.fan_in_fan_out
    return model in _CONV1D_MODELS and module.rpartition(".")[2] in _CONV1D_MODULES


def _note(assumed: Sequence[bool], checkpoint: Checkpoint, adapter: OpenAdapter) -> str:
    """What was assumed of square weights, "" where the question does not arise."""
    if not assumed:
        return ""
    flag = adapter.config.fan_in_fan_out
    model = checkpoint.config.get("model_type")
    because = f"the base is a {model}" if model else "the adapter says fan_in_fan_out"
    though = f", though the adapter says fan_in_fan_out {str(flag).lower()}" if set(assumed) != {flag} else ""
    how = "(in, out)" if all(assumed) else "(out, in)" if not any(assumed) else "(in, out) where they are Conv1D"
    return f"{len(assumed)} square weights are read as {how}: {because}{though}"


def _times(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


# ---- the work ----


@dataclass(frozen=True, slots=True, kw_only=True)
class Survival:
    """What became of an update Δ when W + Δ was cast: squared norms of Δ and of (cast(W + Δ) − W) − Δ, and how many
    of the `entries` are what the base alone would have been cast to.
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
    """What a bake did: what survived by module (in natural order) and by layer, and over all."""

    folder: Path
    modules: Mapping[str, Survival]
    layers: Mapping[str, Survival]
    total: Survival
    seconds: float
    peak_bytes: int


def bake(plan: BakePlan, folder: Path, run: Run, *, replace: bool = False, progress: Progress = silent) -> BakeReport:
    """Carry out a plan: write the base's files with the update added, then rename the finished folder into place.

    Memory: one block of rows of one tensor, and the factors of one module.

    Raises:
        Refused: the result does not fit its precision, or no entry of it differs from the base.
        OutputError: `folder` exists (and `replace` is false), touches base or adapter, or the disk is too small.
    """
    started = time.monotonic()
    demand_apart(plan, folder)
    demand_room(plan, folder)
    checkpoint, found = plan.base.checkpoint, dict[str, Survival]()
    with whole_folder(folder, replace=replace) as partial:
        steps = _Steps(progress, sum(len(header.tensors) for header in checkpoint.headers.values()))
        for part in checkpoint.headers:
            run.outputs[part] = _write_part(plan, part, partial, found, steps)
        _copy_beside(plan, partial)
        modules = {module: found[module] for module in plan.places}
        report = BakeReport(
            folder=folder,
            modules=modules,
            layers=_by_layer(modules),
            total=sum(modules.values(), Survival()),
            seconds=time.monotonic() - started,
            peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        )
        _demand_effect(plan, report.total)
        run.results.update(_results(plan, report))
        (partial / RECORD_FILE).write_text(record_text(run.record()), encoding="utf-8")
    return report


def demand_apart(plan: BakePlan, folder: Path) -> None:
    """OutputError where the output would stand in, on or around the base or the adapter."""
    out = folder.resolve()
    for what, path in (("base", plan.base.checkpoint.folder), ("adapter", plan.adapter.files.weights.parent)):
        place = path.resolve()
        if out.is_relative_to(place) or place.is_relative_to(out):
            raise OutputError(f"{folder}: that is where the {what} is", hint="choose another folder with -o")


def demand_room(plan: BakePlan, folder: Path) -> None:
    """OutputError where the disk cannot take the result."""
    place = folder.absolute().parent
    while not place.exists():
        place = place.parent
    free, need = shutil.disk_usage(place).free, plan.bytes * _SPARE_ROOM
    if need > free:
        raise OutputError(
            f"{need / 1e9:.1f} GB to write, {free / 1e9:.1f} GB free at {place}",
            hint="free some space, or choose a folder on another disk with -o",
        )


class _Steps:
    """Progress over tensors."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def next(self) -> None:
        self._done += 1
        self._progress("bake", self._done, self._total)


def _write_part(plan: BakePlan, part: str, folder: Path, found: dict[str, Survival], steps: _Steps) -> str:
    """Write one file of the base anew, note what survived in each module of it, and return its SHA-256."""
    header = plan.base.checkpoint.headers[part]
    dtypes = {entry.name: plan.stored_as(entry) for entry in header.tensors.values()}
    with (
        (plan.base.checkpoint.folder / part).open("rb", buffering=0) as source,
        ShardWriter(folder / part, header, dtypes) as target,
    ):
        for entry in header.tensors.values():
            # A tensor may stand in a file that the index does not name for it: loading does not take it from there.
            module = plan.modules.get(entry.name) if plan.base.checkpoint.tensors.get(entry.name) == part else None
            if module is not None:
                found[module] = _write_baked(plan, module, entry, source, target)
            else:
                _write_cast(entry, dtypes[entry.name], source, target)
            steps.next()
    return target.sha256


def _write_baked(plan: BakePlan, module: str, entry: TensorEntry, source: FileIO, target: ShardWriter) -> Survival:
    """Write one tensor with the module's update added, rows at a time."""
    # Where the base is wider than fp32, so is the sum.
    update = plan.adapter.read(module, torch.promote_types(DTYPES[entry.dtype], torch.float32))
    left, right = (update.A.T, update.B.T) if plan.places[module].transposed else (update.B, update.A)
    dtype, found, row = DTYPES[plan.stored_as(entry)], Survival(), 0
    for block in blocks(source, entry, entry.shape[1]):
        weight = as_tensor(block, entry.dtype).view(-1, entry.shape[1])
        baked, survival = add(weight, left[row : row + len(weight)] @ right, dtype)
        if not math.isfinite(survival.error):
            raise _does_not_fit(module, weight, dtype)
        target.write(_bytes(baked))
        found += survival
        row += len(weight)
    return found


def add(weight: Tensor, delta: Tensor, dtype: torch.dtype) -> tuple[Tensor, Survival]:
    """cast(W + Δ), and what of Δ survived. `weight` and `delta` are (rows, columns), `delta` is what is computed in."""
    baked = (weight.to(delta.dtype) + delta).to(dtype)
    # In fp64: the rounding of an fp32 sum is not seen in fp32.
    error = (baked.double() - weight).sub_(delta)
    return baked, Survival(
        delta=_squared(delta.double()),
        error=_squared(error),
        same=int((baked == weight.to(dtype)).sum()),
        entries=weight.numel(),
    )


def _squared(values: Tensor) -> float:
    flat = values.flatten()
    return float(flat @ flat)


def _does_not_fit(module: str, weight: Tensor, dtype: torch.dtype) -> Refused:
    if not torch.isfinite(weight).all():
        return Refused(f"{module}: NaN or Inf in the base's own weight", hint="download the base model again")
    return _overflow(module, dtype)


def _overflow(name: str, dtype: torch.dtype) -> Refused:
    return Refused(f"{name}: values overflow {str(dtype).removeprefix('torch.')}", hint="choose a wider --dtype")


def _write_cast(entry: TensorEntry, stored: str, source: FileIO, target: ShardWriter) -> None:
    """Write a tensor that the adapter does not touch: its bytes, or its values in another precision."""
    for block in blocks(source, entry, 1):
        if stored == entry.dtype:
            target.write(block)
            continue
        values = as_tensor(block, entry.dtype)
        cast = values.to(DTYPES[stored])
        if not torch.equal(torch.isfinite(cast), torch.isfinite(values)):
            raise _overflow(entry.name, cast.dtype)
        target.write(_bytes(cast))


def _bytes(values: Tensor) -> memoryview:
    data: memoryview = values.flatten().view(torch.uint8).numpy().data
    return data


def _copy_beside(plan: BakePlan, folder: Path) -> None:
    """Copy what goes with the weights; configuration and index say what has changed."""
    checkpoint = plan.base.checkpoint
    for file in checkpoint.beside:
        shutil.copyfile(file, folder / file.name)
    if plan.dtype != "auto":
        _write_json(folder / CONFIG, _with_dtype(checkpoint.config, _IN_CONFIG[plan.dtype]))
    if checkpoint.index is not None:
        metadata = {**(checkpoint.index.get("metadata") or {}), "total_size": plan.bytes}
        _write_json(folder / INDEX, {**checkpoint.index, "metadata": metadata})


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A configuration whose own precision, and that of every part of it, is `dtype`."""
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]

    def changed(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {k: dtype if k in ("dtype", "torch_dtype") else changed(v) for k, v in value.items()}

    return {**changed(config), **dict.fromkeys(keys, dtype)}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _by_layer(modules: Mapping[str, Survival]) -> dict[str, Survival]:
    """Summed over the modules of each layer, which is named up to its number; a module outside goes by its own name."""
    layers: dict[str, Survival] = {}
    for module, survival in modules.items():
        layer = layer_of(module)
        layers[layer] = layers.get(layer, Survival()) + survival
    return layers


def layer_of(module: str) -> str:
    """`model.layers.7` of `model.layers.7.mlp.up_proj`; a name without a number stands for itself."""
    parts = module.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdecimal()), len(parts))
    return ".".join(parts[: number + 1])


def _demand_effect(plan: BakePlan, total: Survival) -> None:
    if total.delta == 0:
        raise Refused(f"{plan.adapter.ref.id}: every update is zero, so it changes nothing", hint="leave it out")
    if total.same == total.entries:
        raise Refused(
            f"{plan.adapter.ref.id} is too small for {plan.precision}: none of {total.entries:,} weights would change",
            hint="bake with --dtype fp32, or keep the adapter",
        )


def _results(plan: BakePlan, report: BakeReport) -> dict[str, Any]:
    """What run.json keeps: figures over all, by layer, by module. Keys of one record are as in `Survival.figures`."""
    count: dict[str, int] = {}
    for module in report.modules:
        count[layer_of(module)] = count.get(layer_of(module), 0) + 1
    return {
        **report.total.figures,
        "precision": plan.precision,
        "layers": {layer: {"modules": count[layer], **s.figures} for layer, s in report.layers.items()},
        "modules": {
            module: {"tensor": plan.places[module].tensor, "transposed": plan.places[module].transposed, **s.figures}
            for module, s in report.modules.items()
        },
    }
