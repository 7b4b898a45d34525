"""From one LowRank per module to a PEFT folder. Modules are written as they come: memory holds one at a time."""

import json
import math
import re
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeVar

import numpy as np

from lora_cli.errors import DataError, Refused
from lora_cli.formats.base_names import split_revision
from lora_cli.formats.factors import PREFIX
from lora_cli.formats.header import TensorEntry, read_header
from lora_cli.formats.kinds import CONFIG_NAME, WEIGHTS_NAME
from lora_cli.formats.layout import Layout, Place
from lora_cli.formats.numbers import KINDS, StoredTensor
from lora_cli.formats.reader import read_stored
from lora_cli.hashes import Stamp, opened_as
from lora_cli.precision import spoken, torch_dtype

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from lora_cli.algebra.lowrank import LowRank

_CHUNK_BYTES = 1 << 22
Factor = TypeVar("Factor", "Tensor", "NDArray[Any]")


class TensorStream:
    """Writes one safetensors file tensor by tensor; a context manager.

    The header comes first in the file, but needs every shape, which is known only at the end. Room for the largest
    possible header is therefore left at the front and padded with spaces, as the format allows.

    Args:
        path: the file to write.
        names: of every tensor that will be added, in any order.
        dtype: precision on disk of the tensors that are added, as safetensors names it.
        says: the metadata in the header.
    """

    def __init__(self, path: Path, names: Sequence[str], dtype: str, says: Mapping[str, str] | None = None) -> None:
        self.dtype = dtype
        self.empty = True
        """Whether only zeros were added."""
        metadata = {"format": "pt", **(says or {})}
        longest = sum(len(json.dumps(name)) + 120 for name in names) + len(json.dumps(metadata)) + 64
        self._room = -(-longest // 8) * 8
        self._entries: dict[str, Any] = {"__metadata__": metadata}
        self._position = 0
        self._file: BinaryIO = path.open("wb")
        self._file.seek(8 + self._room)

    def add(self, name: str, tensor: "Tensor") -> bool:
        """Write one tensor, rounded to the precision on disk; False where that leaves nothing but zeros.

        Refused where its values do not fit into that precision.
        """
        import torch

        cast = tensor.to(torch_dtype(self.dtype)).contiguous().cpu()
        if not torch.isfinite(cast).all():
            raise Refused(f"{name}: values overflow {spoken(self.dtype)}", hint="choose a wider --dtype")
        bits = (cast.view(torch.uint16) if self.dtype == "BF16" else cast).numpy()
        self.put(name, StoredTensor(bits, self.dtype))
        anything = bool(cast.any())
        self.empty &= not anything
        return anything

    def put(self, name: str, stored: StoredTensor) -> None:
        """Write one tensor as it is, in its own precision."""
        bits = np.ascontiguousarray(stored.bits)
        self._enter(name, stored.dtype, bits.shape, bits.nbytes)
        self._file.write(bits.data)

    def copy(self, name: str, entry: TensorEntry, file: BinaryIO) -> None:
        """Write one tensor of another file unchanged. DataError where that file ends inside it."""
        size = entry.end - entry.begin
        self._enter(name, entry.dtype, entry.shape, size)
        file.seek(entry.begin)
        for at in range(0, size, _CHUNK_BYTES):
            data = file.read(min(_CHUNK_BYTES, size - at))
            if len(data) < min(_CHUNK_BYTES, size - at):
                raise DataError(f"{name}: the file ends inside this tensor")
            self._file.write(data)

    def _enter(self, name: str, dtype: str, shape: Sequence[int], size: int) -> None:
        """Give a tensor of `size` bytes its place, and an entry in the header."""
        offsets = [self._position, self._position + size]
        self._entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        self._position += size

    def finish(self) -> None:
        """Write the header, which makes the file valid."""
        header = json.dumps(self._entries, separators=(",", ":")).encode()
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._room) + header.ljust(self._room))
        self._file.flush()

    def __enter__(self) -> "TensorStream":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


class Saved(NamedTuple):
    """Tensors that were saved as they are: `tensors` by their names in the base, and the file that holds them."""

    file: Path
    stamp: Stamp
    tensors: Mapping[str, TensorEntry]


class AdapterWriter:
    """Writes `adapter_model.safetensors` and `adapter_config.json` into an existing folder; a context manager.

    Alpha equals the rank everywhere: the factors hold the whole scale.

    Args:
        folder: the folder for the two files.
        layout: the place of every module; places of modules that are not added become zeros.
        dtype: precision of the factors on disk, as safetensors names it.
        saved: tensors to store beside the factors.
    """

    def __init__(self, folder: Path, layout: Layout, dtype: str, saved: Saved | None = None) -> None:
        self.folder = folder
        self.ranks: dict[str, int] = {}
        """The rank that each module was added with."""
        self.empty = True
        """Whether no module was written that changes anything."""
        self._layout = layout
        self._dtype = dtype
        self._saved = saved
        self._apart = {module: _apart(module, place) for module, place in layout.of.items()}
        self._stream = self._stream_of([name for pair in self._apart.values() for name in pair])

    def add(self, module: str, update: "LowRank") -> None:
        """Write the factors of one module. An update of rank 0 goes out as rank 1 of zeros.

        Raises:
            Refused: the values do not fit into the precision on disk.
        """
        b, a = update.B, update.A
        if update.rank == 0:
            b, a = b.new_zeros(b.shape[0], 1), a.new_zeros(1, a.shape[1])
        self.ranks[module] = a.shape[0]
        kernel = self._layout.of[module].kernel
        name_a, name_b = self._apart[module]
        written = [
            self._stream.add(name_a, _with_kernel(a, kernel)),
            self._stream.add(name_b, _with_kernel(b, (1,) * len(kernel))),
        ]
        self.empty &= not all(written)

    def put(self, module: str, b: StoredTensor, a: StoredTensor) -> None:
        """Write the factors of one module as they are, B (out, r) and A (r, in) in the precision on disk."""
        self.ranks[module] = a.bits.shape[0]
        kernel = self._layout.of[module].kernel
        for name, factor, inner in zip(self._apart[module], (a, b), (kernel, (1,) * len(kernel)), strict=True):
            self._stream.put(name, StoredTensor(_with_kernel(factor.bits, inner), factor.dtype))
        self.empty &= a.zero or b.zero

    def __enter__(self) -> "AdapterWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.__exit__(*error)

    def finish(self, config: Mapping[str, Any], *, compact: bool = False) -> None:
        """Write the header, and `config` completed with rank and alpha.

        Every module gets the largest rank, padded with zeros: the only form that every program reads in the same
        way. `compact` leaves each module at its own rank, in `rank_pattern` and `alpha_pattern`.
        """
        self._add_saved(self._stream)
        self._stream.finish()
        places = self._layout.places
        ranks = self._own_ranks() if compact else dict.fromkeys(places, max(self.ranks.values()))
        if any(len(place.modules) > 1 or self.ranks.get(place.modules[0]) != ranks[place] for place in places):
            self._arrange(ranks)
        text = json.dumps({**_defaults(), **self._in_config(ranks), **config}, indent=2, sort_keys=True)
        (self.folder / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")

    def _own_ranks(self) -> dict[Place, int]:
        """The rank of every place, where they need not have the same."""
        ranks = {place: max(self.ranks.get(module, 1) for module in place.modules) for place in self._layout.places}
        singles = [place for place in ranks if place in self._layout.singles]
        return ranks | dict.fromkeys(singles, max((ranks[place] for place in singles), default=0))

    def _in_config(self, ranks: Mapping[Place, int]) -> dict[str, Any]:
        """Ranks as a configuration gives them: that of single experts, else the commonest, as r; others as patterns."""
        singles = [ranks[place] for place in self._layout.singles]
        common = singles[0] if singles else Counter(ranks.values()).most_common(1)[0][0]
        others = {_pattern_key(place.target): rank for place, rank in ranks.items() if rank != common}
        return {"r": common, "lora_alpha": common, "rank_pattern": others, "alpha_pattern": others}

    def _arrange(self, ranks: Mapping[Place, int]) -> None:
        """Rewrite the weights as the layout has them, filled up with zeros to `ranks`, one tensor at a time."""
        weights, apart = self.folder / WEIGHTS_NAME, self.folder / "apart.safetensors"
        weights.rename(apart)
        entries = read_header(apart).tensors
        names = [name for place in ranks for name in place.names]
        with apart.open("rb", buffering=0) as file, self._stream_of(names) as stream:

            def read(name: str, shape: tuple[int, int], axis: int) -> "NDArray[Any]":
                if name not in entries:
                    return np.zeros(shape, KINDS[self._dtype])
                return filled_up(read_stored(file.fileno(), entries[name]).bits, shape[axis], axis)

            for place, rank in ranks.items():
                name_a, name_b = place.names
                every_a, every_b = zip(*(self._apart[module] for module in place.modules), strict=True)
                out_features, in_features = place.shape
                a = _a_of([read(one, (rank, in_features), 0) for one in every_a])
                b = _b_of([read(one, (out_features, rank), 1) for one in every_b])
                stream.put(name_a, StoredTensor(a, self._dtype))
                stream.put(name_b, StoredTensor(b, self._dtype))
            self._add_saved(stream)
            stream.finish()
        apart.unlink()

    def _stream_of(self, names: Sequence[str]) -> TensorStream:
        saved = () if self._saved is None else self._saved.tensors
        return TensorStream(self.folder / WEIGHTS_NAME, [*names, *(PREFIX + name for name in saved)], self._dtype)

    def _add_saved(self, stream: TensorStream) -> None:
        if self._saved is not None:
            with opened_as(self._saved.file, self._saved.stamp, f"{self._saved.file}: its tensors") as file:
                for name, entry in self._saved.tensors.items():
                    stream.copy(PREFIX + name, entry, file)


def base_entries(base: str) -> dict[str, str]:
    """How a PEFT configuration names the base `name@revision`; without a revision that key is left out."""
    name, revision = split_revision(base)
    return {"base_model_name_or_path": name} | ({"revision": revision} if revision else {})


def _apart(module: str, place: Place) -> tuple[str, str]:
    """Names of A and B of one module while modules are collected: those of the result where it stands alone there."""
    return place.names if len(place.modules) == 1 else (f"{module}.A", f"{module}.B")


def _with_kernel(factor: Factor, kernel: tuple[int, ...]) -> Factor:
    """A factor (rows, columns · size of the kernel) with the dimensions of a convolution."""
    return factor.reshape(factor.shape[0], factor.shape[1] // math.prod(kernel), *kernel)


def filled_up(factor: "NDArray[Any]", rank: int, axis: int) -> "NDArray[Any]":
    """A factor with zeros behind its ranks (dimension `axis`) up to `rank`."""
    if factor.shape[axis] == rank:
        return factor
    more = [(0, 0)] * factor.ndim
    more[axis] = 0, rank - factor.shape[axis]
    return np.pad(factor, more)


def _a_of(experts: "Sequence[NDArray[Any]]") -> "NDArray[Any]":
    """A as PEFT keeps it, grouped by expert."""
    return np.concatenate([*experts])


def _b_of(experts: "Sequence[NDArray[Any]]") -> "NDArray[Any]":
    """B as PEFT keeps it, grouped by rank."""
    return experts[0] if len(experts) == 1 else np.stack([*experts], axis=2).reshape(len(experts[0]), -1)


def _pattern_key(module: str) -> str:
    """A key of `rank_pattern` that PEFT matches with this module alone, whatever the order of the keys.

    PEFT takes the first key for which `(.*\\.)?(key)$` matches a module's name, and sorts the keys when it saves: a key
    must neither be the ending of another name nor hold a dot that stands for any character.
    """
    return "^" + re.sub(r"([^\w-])", r"\\\1", module)


def _defaults() -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
    }
