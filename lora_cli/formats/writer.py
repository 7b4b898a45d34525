"""From one LowRank per module to a PEFT folder. Modules are written as they come: memory holds one at a time."""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_cli.algebra.lowrank import LowRank
from lora_cli.errors import Refused
from lora_cli.formats.base_names import split_revision
from lora_cli.formats.factors import PREFIX
from lora_cli.formats.header import TensorEntry, read_header
from lora_cli.formats.kinds import CONFIG_NAME, WEIGHTS_NAME
from lora_cli.formats.layout import Layout, Place
from lora_cli.formats.reader import read_tensor
from lora_cli.formats.stream import FileStream
from lora_cli.hashes import Stamp, opened_as
from lora_cli.precision import dtype_name, stored_as


class TensorStream(FileStream):
    """Writes one safetensors file of tensors in one precision; a context manager.

    Args:
        path, names, says: as of `FileStream`.
        dtype: precision on disk.
    """

    def __init__(
        self, path: Path, names: Sequence[str], dtype: torch.dtype, says: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(path, names, says)
        self.dtype, self._stored = dtype, stored_as(dtype)
        self.empty = True
        """Whether only zeros were written."""

    def add(self, name: str, tensor: Tensor) -> bool:
        """Write one tensor, rounded to the precision on disk; False where that leaves nothing but zeros.

        Refused where its values do not fit into that precision.
        """
        cast = tensor.to(self.dtype)
        if not torch.isfinite(cast).all():
            raise Refused(f"{name}: values overflow {dtype_name(self.dtype)}", hint="choose a wider --dtype")
        # Of a factor with one row or column the strides may be anything, and a view as bytes minds them.
        data = cast.contiguous().cpu().view(-1).view(torch.uint8).numpy().data
        self._enter(name, self._stored, tensor.shape, data.nbytes)
        self._file.write(data)
        anything = bool(cast.any())
        self.empty &= not anything
        return anything


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
        dtype: precision of the factors on disk.
        saved: tensors to store beside the factors.
    """

    def __init__(self, folder: Path, layout: Layout, dtype: torch.dtype, saved: Saved | None = None) -> None:
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

    def add(self, module: str, update: LowRank) -> None:
        """Write the factors of one module. An update of rank 0 goes out as rank 1 of zeros.

        Raises:
            Refused: the values do not fit into the precision on disk.
        """
        rank = update.rank
        if rank == 0:
            out_features, in_features = update.shape
            update, rank = LowRank(update.B.new_zeros(out_features, 1), update.A.new_zeros(1, in_features)), 1
        self.ranks[module] = rank
        place = self._layout.of[module]
        name_a, name_b = self._apart[module]
        written = [
            self._stream.add(name_a, _with_kernel(update.A, place.kernel)),
            self._stream.add(name_b, _with_kernel(update.B, (1,) * len(place.kernel))),
        ]
        self.empty &= not all(written)

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

            def read(name: str) -> Tensor | None:
                return read_tensor(file.fileno(), entries[name], self._dtype) if name in entries else None

            for place, rank in ranks.items():
                name_a, name_b = place.names
                every_a, every_b = zip(*(self._apart[module] for module in place.modules), strict=True)
                out_features, in_features = place.shape
                stream.add(name_a, _a_of([_filled_up(read(one), (rank, in_features), dim=0) for one in every_a]))
                stream.add(name_b, _b_of([_filled_up(read(one), (out_features, rank), dim=1) for one in every_b]))
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


def _with_kernel(factor: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """A factor (rows, columns · size of the kernel) with the dimensions of a convolution."""
    return factor.reshape(factor.shape[0], factor.shape[1] // math.prod(kernel), *kernel)


def _filled_up(factor: Tensor | None, shape: tuple[int, int], *, dim: int) -> Tensor:
    """`factor` with zeros behind its ranks (dimension `dim`) up to those of `shape`; without a factor all zeros."""
    if factor is None:
        return torch.zeros(shape)
    more = list(factor.shape)
    more[dim] = shape[dim] - more[dim]
    return torch.cat([factor, factor.new_zeros(more)], dim)


def _a_of(experts: Sequence[Tensor]) -> Tensor:
    """A as PEFT keeps it, grouped by expert."""
    return torch.cat([*experts])


def _b_of(experts: Sequence[Tensor]) -> Tensor:
    """B as PEFT keeps it, grouped by rank."""
    return experts[0] if len(experts) == 1 else torch.stack([*experts], dim=2).flatten(1)


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
