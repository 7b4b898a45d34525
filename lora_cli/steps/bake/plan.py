"""The plan of a bake, checked before any weight is read: the base, and the tensor of each module's weight."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from lora_cli.errors import Refused, UsageError
from lora_cli.formats.base_files import OBJECTS, json_object
from lora_cli.formats.base_names import public_base
from lora_cli.formats.checkpoint import (
    Checkpoint,
    HubModel,
    cached_model,
    folder_or_hub,
    open_checkpoint,
    or_a_folder_like,
    size_of,
    version_of_folder,
)
from lora_cli.formats.delta import OpenDelta
from lora_cli.formats.header import TensorEntry
from lora_cli.formats.reader import OpenAdapter, natural
from lora_cli.formats.skeleton import Matrix, Share, Skeleton
from lora_cli.hub.client import Hub
from lora_cli.models.download import download_base
from lora_cli.names import layer_of, leaf
from lora_cli.precision import CHOICES, FLOATS, STORED, spoken
from lora_cli.records import Progress, silent
from lora_cli.steps.bases import skeleton_at
from lora_cli.text import counted

# Models of transformers whose attention and MLP are Conv1D, which stores (in, out), and the names of these modules.
_CONV1D_MODELS = frozenset(("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"))
_CONV1D_MODULES = frozenset(("c_attn", "q_attn", "c_proj", "c_fc"))
_TIED_MODULES = frozenset(("lm_head", "embed_out"))


@dataclass(frozen=True, kw_only=True)
class Base:
    """A base model on this machine: its name in records, its version as in `base_model.pin`, and its files."""

    name: str
    version: str
    checkpoint: Checkpoint

    @cached_property
    def skeleton(self) -> Skeleton | None:
        """The modules of the base's class, None if transformers has no class for the base."""
        return skeleton_at(self.checkpoint.folder)

    @property
    def inputs(self) -> dict[str, str]:
        """The base's part of a run's inputs."""
        return {f"base:{self.name}@{self.version}": self.version}


def is_here(model: str) -> bool:
    """False if `model` is a Hub id that is not downloaded yet. NothingMatched if it is neither folder nor Hub id."""
    return _here(folder_or_hub(model)) is not None


def _here(found: Path | HubModel) -> Path | None:
    """The folder of a model that is on this machine, in the Hub client's cache with or without a tokenizer."""
    return found if isinstance(found, Path) else cached_model(*found, tokenizer=False)


def find_base(model: str, *, name: str = "", announce: Callable[[str], None], progress: Progress = silent) -> Base:
    """The base in a folder or in the Hub client's cache; downloads a Hub id that is not in the cache.

    Args:
        model: a folder or a Hub id, with `@revision` for another revision than the main branch.
        name: the base's name in records and messages; by default `public_base(model)`.
        announce: called with a line about each download before it starts.

    Raises:
        NothingMatched, AccessDenied, NetworkError: no such model, or it cannot be downloaded.
        Refused: see `open_checkpoint`.
    """
    name = name or public_base(model)
    found = folder_or_hub(model)
    if isinstance(found, Path):
        checkpoint = _open(found, name)
        return Base(name=name, version=version_of_folder(found, progress), checkpoint=checkpoint)
    with or_a_folder_like(found.repo):
        cached = _here(found) or download_base(Hub(progress=progress), *found, announce=announce, progress=progress)
    return Base(name=name, version=cached.name, checkpoint=_open(cached, name))


def _open(folder: Path, name: str) -> Checkpoint:
    """`open_checkpoint`; Refused for a model that is quantised, or has a broken file that would be copied."""
    checkpoint = open_checkpoint(folder, name)
    for file in checkpoint.beside:
        if file.name in OBJECTS:
            json_object(file, name)
    if checkpoint.config.get("quantization_config"):
        raise Refused(
            f"{name} is quantised: an update cannot be added to its integers",
            hint="bake into the model it was quantised from, or keep the adapter",
        )
    return checkpoint


class Piece(NamedTuple):
    """A part of a module's update and where it is added: to `rows` rows of `tensor`, seen as a matrix, from `at` on.

    These are the rows from `row` on of the update (out, in), or of its transpose where the weight is stored (in, out).
    """

    tensor: str
    transposed: bool
    at: int
    row: int
    rows: int


@dataclass(frozen=True, kw_only=True)
class BakePlan:
    """A bake that passed every check which needs no weights. `places` are by module; `notes` lists the assumptions."""

    adapter: OpenAdapter | OpenDelta
    base: Base
    places: Mapping[str, tuple[Piece, ...]]
    dtype: str
    notes: tuple[str, ...]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that decide the result besides adapter and base."""
        return {"base": self.base.name, "dtype": self.dtype}

    @property
    def inputs(self) -> list[tuple[str, Path]]:
        """The folders that are read, each with its name for people."""
        return [("base", self.base.checkpoint.folder), ("adapter", self.adapter.folder)]

    @cached_property
    def pieces(self) -> Mapping[str, tuple[tuple[str, Piece], ...]]:
        """Tensor → the modules whose updates are added to it and where, in the order of its rows."""
        found: dict[str, list[tuple[str, Piece]]] = {}
        for module, pieces in self.places.items():
            for piece in pieces:
                found.setdefault(piece.tensor, []).append((module, piece))
        return {tensor: tuple(sorted(some, key=lambda pair: pair[1].at)) for tensor, some in found.items()}

    @property
    def precision(self) -> str:
        """The precision of the baked tensors, in words."""
        entries = map(self.base.checkpoint.entry, self.pieces)
        return ", ".join(sorted(set(map(spoken, map(self.stored_as, entries)))))

    @property
    def bytes(self) -> int:
        """The size of the tensors that will be written."""
        headers = self.base.checkpoint.headers.values()
        return sum(size_of(entry, self.stored_as(entry)) for header in headers for entry in header.tensors.values())

    def stored_as(self, entry: TensorEntry) -> str:
        """The dtype a tensor of the base is written in."""
        return entry.dtype if self.dtype == "auto" or entry.dtype not in FLOATS else STORED[self.dtype]


def plan(adapter: OpenAdapter | OpenDelta, base: Base, *, dtype: str = "auto") -> BakePlan:
    """Check everything that can be checked before a weight is read.

    Args:
        dtype: fp32, bf16 or fp16 for every tensor of floats; "auto" leaves each as it is.

    Raises:
        UsageError: an unknown dtype.
        Refused: a module that the base does not have, has in another shape or type, or shares with its embedding.
    """
    if dtype not in CHOICES:
        raise UsageError(f"--dtype is one of {', '.join(CHOICES)}, not {dtype!r}")
    checkpoint = base.checkpoint
    _refuse_tied(adapter, base)
    skeleton = base.skeleton
    found = _by_name(adapter, base) if skeleton is None else _by_class(adapter, base, skeleton)
    _demand_one_each(adapter, base, found)
    for module, pieces in found.items():
        for piece in pieces:
            if (stored := checkpoint.entry(piece.tensor).dtype) not in FLOATS:
                raise Refused(f"{module} is {stored} in {base.name}: bake can add updates to floats only")
    notes = (_of_squares(found, checkpoint, adapter), *_of_absent(checkpoint))
    return BakePlan(adapter=adapter, base=base, places=found, dtype=dtype, notes=tuple(filter(None, notes)))


def _by_class(adapter: OpenAdapter | OpenDelta, base: Base, skeleton: Skeleton) -> dict[str, tuple[Piece, ...]]:
    """The tensor rows of each module's update, by the base's class and the names from which loading reads them."""
    tensors = {name: base.checkpoint.entry(name).shape for name in base.checkpoint.tensors}
    stored = skeleton.stored(tensors)
    found: dict[str, tuple[Piece, ...]] = {}
    missing = []
    for module in natural(adapter.modules):
        matrix = skeleton.get(module)
        if matrix is None or matrix.parameter not in stored.shares:
            if matrix is not None and (how := stored.others.get(matrix.parameter)):
                raise Refused(f"{module} is kept in {base.name} in another arrangement ({how}): bake cannot add to it")
            if matrix is not None and matrix.kind == "embedding":
                raise Refused(f"{module} is not in {base.name}: its class computes it, so bake has no weight to add to")
            missing.append(module)
            continue
        if matrix.shape != adapter.shape(module):
            raise _other_shape(module, matrix.shape, adapter, base)
        pieces = tuple(pieces_of(matrix, stored.shares[matrix.parameter], tensors))
        if sum(piece.rows for piece in pieces) != matrix.shape[1 if pieces and pieces[0].transposed else 0]:
            raise _other_shape(module, tensors[stored.shares[matrix.parameter][0].tensor], adapter, base)
        found[module] = pieces
    _demand_all(adapter, base, missing)
    return found


def pieces_of(matrix: Matrix, shares: Sequence[Share], tensors: Mapping[str, tuple[int, ...]]) -> Iterator[Piece]:
    """The rows of a matrix (of its transpose, if it is stored transposed) that each tensor of a checkpoint holds.

    Args:
        shares: those of the matrix's parameter. tensors: the shapes of the checkpoint's tensors.
    """
    height = matrix.shape[1] if matrix.transposed else matrix.shape[0]
    for share in shares:
        if not share.rows:
            *stack, rows, columns = matrix.stored
            shape = (*stack, columns, rows) if share.turned else matrix.stored
            # Of a part of a matrix that is stored turned, no rows stand together.
            if tensors[share.tensor] == shape and (not share.turned or math.prod(matrix.shape) == rows * columns):
                at = 0 if matrix.expert is None else matrix.expert * shape[1] + matrix.row
                height = matrix.shape[1] if matrix.transposed != share.turned else matrix.shape[0]
                yield Piece(share.tensor, matrix.transposed != share.turned, at, 0, height)
        elif share.expert == matrix.expert:
            begin, end = max(share.row, matrix.row), min(share.row + share.rows, matrix.row + height)
            if begin < end:
                at = share.at + begin - share.row
                yield Piece(share.tensor, matrix.transposed, at, begin - matrix.row, end - begin)


def _by_name(adapter: OpenAdapter | OpenDelta, base: Base) -> dict[str, tuple[Piece, ...]]:
    """The tensor of each module's update in a base without a known class: the one of the module's name."""
    checkpoint = base.checkpoint
    found: dict[str, tuple[Piece, ...]] = {}
    missing = []
    for module, tensor in weights_of(natural(adapter.modules), checkpoint.tensors).items():
        if tensor is None:
            missing.append(module)
            continue
        entry, shape = checkpoint.entry(tensor), adapter.shape(module)
        if entry.shape not in (shape, shape[::-1]):
            raise _other_shape(module, entry.shape, adapter, base)
        square = shape[0] == shape[1]
        transposed = _is_conv1d(module, checkpoint, adapter) if square else entry.shape != shape
        found[module] = (Piece(tensor, transposed, 0, 0, entry.shape[0]),)
    _demand_all(adapter, base, missing)
    return found


def _demand_all(adapter: OpenAdapter | OpenDelta, base: Base, missing: Sequence[str]) -> None:
    if missing:
        total = len(adapter.modules)
        raise Refused(
            f"{adapter.ref.id} does not fit {base.name}: no module {missing[0]}; "
            f"modules that match: {total - len(missing)} of {total}",
            hint="use the adapter with the base model it was trained on",
        )


def _other_shape(module: str, shape: Sequence[int], adapter: OpenAdapter | OpenDelta, base: Base) -> Refused:
    return Refused(
        f"{module} is {_times(shape)} in {base.name} and {_times(adapter.shape(module))} in {adapter.ref.id}",
        hint="use the adapter with the base model it was trained on",
    )


def _refuse_tied(adapter: OpenAdapter | OpenDelta, base: Base) -> None:
    """Refused where an update of one module would change another that shares its weight."""
    for module in natural(adapter.modules):
        if other := _tied_to(module, base):
            raise Refused(
                f"{adapter.ref.id} adapts {module}, whose weight in {base.name} is tied to {other}",
                hint="keep the adapter: baking it would change the other module too",
            )


def _tied_to(module: str, base: Base) -> str:
    """The module that shares a module's weight, "" where none does."""
    if base.skeleton is not None:
        return base.skeleton.ties.get(module, ("",))[0]
    tied = base.checkpoint.config.get("tie_word_embeddings")
    shared = tied or (tied is None and f"{module}.weight" not in base.checkpoint.tensors)
    return "the embedding" if shared and leaf(module) in _TIED_MODULES else ""


def _demand_one_each(adapter: OpenAdapter | OpenDelta, base: Base, found: Mapping[str, tuple[Piece, ...]]) -> None:
    """Refused where two modules would be added to the same rows of one tensor."""
    taken: dict[tuple[str, int], str] = {}
    for module, pieces in found.items():
        for piece in pieces:
            if taken.setdefault((piece.tensor, piece.at), module) != module:
                other = taken[piece.tensor, piece.at]
                raise Refused(f"{adapter.ref.id}: {other} and {module} are one weight in {base.name}")


def weights_of(modules: Sequence[str], tensors: Collection[str]) -> dict[str, str | None]:
    """The tensor that is each module's weight: of its name, or of its name with the model's prefix taken off or put on.

    Checkpoints are saved from the model with its head (`transformer.h.0…`) or without (`h.0…`), and adapters are
    trained on either. None for a module with no matching tensor or with more than one.
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
    parts, layer = module.split("."), layer_of(module)
    stack = layer.stack if layer else module
    names = [".".join([*parts[cut:], "weight"]) for cut in range(1, stack.count(".") + 1)]
    return [name for name in names if name in tensors]


def _is_conv1d(module: str, checkpoint: Checkpoint, adapter: OpenAdapter | OpenDelta) -> bool:
    """Is a square weight stored (in, out)? The model type decides, as in PEFT; without one, the adapter's flag."""
    model = checkpoint.config.get("model_type")
    if not model:
        return adapter.fan_in_fan_out
    return isinstance(model, str) and model in _CONV1D_MODELS and leaf(module) in _CONV1D_MODULES


def _of_squares(
    found: Mapping[str, tuple[Piece, ...]], checkpoint: Checkpoint, adapter: OpenAdapter | OpenDelta
) -> str:
    """A note on how square weights are read, "" if they are (out, in) and the adapter's flag agrees."""
    flag = adapter.fan_in_fan_out
    squares = [pieces[0].transposed for module, pieces in found.items() if len(set(adapter.shape(module))) == 1]
    assumed = [transposed for transposed in squares if transposed or flag]
    if not assumed:
        return ""
    model = checkpoint.config.get("model_type")
    because = f"the base is a {model}" if model else "the adapter sets fan_in_fan_out"
    though = f", although the adapter sets fan_in_fan_out {str(flag).lower()}" if set(assumed) != {flag} else ""
    how = "(in, out)" if all(assumed) else "(out, in)" if not any(assumed) else "(in, out) where they are Conv1D"
    return f"{counted(len(assumed), 'square weight')} read as {how}: {because}{though}"


def _of_absent(checkpoint: Checkpoint) -> list[str]:
    """Notes on the files that loading the result needs but bake does not write."""
    absent = []
    if checkpoint.config.get("auto_map"):
        absent.append("the base comes with code (auto_map), which is not copied: loading the result will ask for it")
    if not any(file.name.startswith(("tokenizer", "tekken", "vocab", "spiece")) for file in checkpoint.beside):
        absent.append("the base has no tokenizer beside its weights, so the result has none")
    return absent


def _times(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))
