"""What a bake will do, decided and checked before a weight is read: which base, and where each module's weight is."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lora_cli.adapters.base_names import MAIN, public_base
from lora_cli.adapters.checkpoint import (
    CONFIG,
    INDEX,
    WEIGHTS,
    Checkpoint,
    HubModel,
    cached_model,
    folder_or_hub,
    open_checkpoint,
    size_of,
    version_of_folder,
    wanted_files,
)
from lora_cli.adapters.delta import OpenDelta
from lora_cli.adapters.header import FLOAT_DTYPES, TensorEntry
from lora_cli.adapters.reader import OpenAdapter, natural
from lora_cli.errors import HeaderError, Refused, UsageError
from lora_cli.hub import Hub, cached_file
from lora_cli.records import Progress, silent

PRECISIONS = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
_SHORT = {stored: short for short, stored in PRECISIONS.items()}
# Models of transformers whose attention and MLP are Conv1D, which stores (in, out), and the names of these modules.
_CONV1D_MODELS = frozenset(("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"))
_CONV1D_MODULES = frozenset(("c_attn", "q_attn", "c_proj", "c_fc"))
_TIED_MODULES = frozenset(("lm_head", "embed_out"))


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
    return _here(folder_or_hub(model)) is not None


def _here(found: Path | HubModel) -> Path | None:
    """The folder of a model that is on this machine, in the Hub client's cache with or without a tokenizer."""
    return found if isinstance(found, Path) else cached_model(*found, tokenizer=False)


def find_base(model: str, *, name: str = "", announce: Callable[[str], None], progress: Progress = silent) -> Base:
    """The base in a folder or in the Hub client's cache, into which it is downloaded if it is not there.

    Args:
        model: a folder or a Hub id, `@revision` where it is not the main branch.
        name: what records and messages call it, where that is not `public_base(model)`.
        announce: is told what is downloaded, before it is.

    Raises:
        NothingMatched, AccessDenied, NetworkError: there is none, or it cannot be had.
        Refused: see `open_checkpoint`.
    """
    name = name or public_base(model)
    found = folder_or_hub(model)
    if isinstance(found, Path):
        checkpoint = _open(found, name)
        return Base(name=name, version=version_of_folder(found), checkpoint=checkpoint)
    cached = _here(found) or download_base(Hub(progress=progress), *found, announce=announce, progress=progress)
    return Base(name=name, version=cached.name, checkpoint=_open(cached, name))


def _open(folder: Path, name: str) -> Checkpoint:
    """`open_checkpoint`, with the model's name in what it says of malformed files."""
    try:
        return open_checkpoint(folder, name)
    except HeaderError as error:
        raise HeaderError(f"{name}: {error.message}", hint=error.hint or "download the base model again") from error


def download_base(
    hub: Hub, repo: str, revision: str = MAIN, *, announce: Callable[[str], None], progress: Progress = silent
) -> Path:
    """Bring a model into the Hub client's cache: its folder there, named by the commit."""
    # Asked for by its branch, so that the cache learns which commit that is and needs no network tomorrow.
    commit = hub.download(repo, CONFIG, revision).parent.name
    listed = hub.repository(repo, commit).files
    split = INDEX in listed and WEIGHTS not in listed
    files = wanted_files(listed, hub.download(repo, INDEX, commit) if split else None, repo)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a module's weight is: the tensor's name, and whether it is stored (in, out) and not (out, in)."""

    tensor: str
    transposed: bool


@dataclass(frozen=True, kw_only=True)
class BakePlan:
    """A bake that passed every check which needs no weights. `places` is by module; `notes` say what was assumed."""

    adapter: OpenAdapter | OpenDelta
    base: Base
    places: Mapping[str, Place]
    dtype: str
    notes: tuple[str, ...]

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


def plan(adapter: OpenAdapter | OpenDelta, base: Base, *, dtype: str = "auto") -> BakePlan:
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
    tensors = _present(adapter, base, weights_of(natural(adapter.modules), checkpoint.tensors))
    places: dict[str, Place] = {}
    assumed = []
    for module, tensor in tensors.items():
        entry, shape = checkpoint.entry(tensor), adapter.shape(module)
        if entry.dtype not in FLOAT_DTYPES:
            raise Refused(f"{module} is {entry.dtype} in {base.name}: an update is added to floats only")
        if entry.shape not in (shape, shape[::-1]):
            raise Refused(
                f"{module} is {_times(entry.shape)} in {base.name} and {_times(shape)} in {adapter.ref.id}",
                hint="use the adapter with the base model it was trained on",
            )
        square = shape[0] == shape[1]
        transposed = _is_conv1d(module, checkpoint, adapter) if square else entry.shape != shape
        if square and (transposed or adapter.fan_in_fan_out):
            assumed.append(transposed)
        places[module] = Place(tensor=tensor, transposed=transposed)
    notes = (_of_squares(assumed, checkpoint, adapter), *_of_absent(checkpoint))
    return BakePlan(adapter=adapter, base=base, places=places, dtype=dtype, notes=tuple(filter(None, notes)))


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


def _present(adapter: OpenAdapter | OpenDelta, base: Base, weights: Mapping[str, str | None]) -> dict[str, str]:
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


def _is_conv1d(module: str, checkpoint: Checkpoint, adapter: OpenAdapter | OpenDelta) -> bool:
    """Is a square weight stored (in, out)? The model decides, as in PEFT; where none is named, the adapter's flag."""
    model = checkpoint.config.get("model_type")
    if not model:
        return adapter.fan_in_fan_out
    return isinstance(model, str) and model in _CONV1D_MODELS and module.rpartition(".")[2] in _CONV1D_MODULES


def _of_squares(assumed: Sequence[bool], checkpoint: Checkpoint, adapter: OpenAdapter | OpenDelta) -> str:
    """What was assumed of square weights, "" where the question does not arise."""
    if not assumed:
        return ""
    flag = adapter.fan_in_fan_out
    model = checkpoint.config.get("model_type")
    because = f"the base is a {model}" if model else "the adapter says fan_in_fan_out"
    though = f", though the adapter says fan_in_fan_out {str(flag).lower()}" if set(assumed) != {flag} else ""
    how = "(in, out)" if all(assumed) else "(out, in)" if not any(assumed) else "(in, out) where they are Conv1D"
    return f"{len(assumed)} square weights are read as {how}: {because}{though}"


def _of_absent(checkpoint: Checkpoint) -> list[str]:
    """What loading the result will want that does not come along."""
    absent = []
    if checkpoint.config.get("auto_map"):
        absent.append("the base comes with code (auto_map), which is not copied: loading the result will ask for it")
    if not any(file.name.startswith(("tokenizer", "tekken", "vocab", "spiece")) for file in checkpoint.beside):
        absent.append("the base has no tokenizer beside its weights, so the result has none")
    return absent


def _times(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))
