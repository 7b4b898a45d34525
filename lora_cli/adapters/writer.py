"""From one LowRank per module to a PEFT folder. Modules are written as they come: memory holds one at a time."""

import json
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lora_cli.adapters.base_names import split_revision
from lora_cli.adapters.checks import CONFIG_NAME, WEIGHTS_NAME
from lora_cli.adapters.lowrank import LowRank
from lora_cli.adapters.reader import DTYPES
from lora_cli.errors import Refused

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PREFIX = "base_model.model."


class TensorStream:
    """Writes one safetensors file tensor by tensor; a context manager.

    The format wants its header first, and the header wants every shape, which is known only at the end: room for the
    largest possible header is left at the front and filled up with spaces, as the format allows.

    Args:
        path: the file to write.
        names: of every tensor that will be added, in any order.
        dtype: precision on disk.
        says: what stands in the header besides the tensors.
    """

    def __init__(
        self, path: Path, names: Sequence[str], dtype: torch.dtype, says: Mapping[str, str] | None = None
    ) -> None:
        self.dtype = dtype
        self.empty = True
        """Whether nothing but zeros was written."""
        metadata = {"format": "pt", **(says or {})}
        longest = sum(len(json.dumps(name)) + 120 for name in names) + len(json.dumps(metadata)) + 64
        self._room = -(-longest // 8) * 8
        self._entries: dict[str, Any] = {"__metadata__": metadata}
        self._position = 0
        self._file: BinaryIO = path.open("wb")
        self._file.seek(8 + self._room)

    def add(self, name: str, tensor: Tensor) -> bool:
        """Write one tensor, rounded to the precision on disk; False where that leaves nothing but zeros.

        Refused where its values do not fit into that precision.
        """
        cast = tensor.to(self.dtype)
        if not torch.isfinite(cast).all():
            raise Refused(f"{name}: values overflow {_NAMES[self.dtype]}", hint="choose a wider --dtype")
        # Of a factor with one row or column the strides may be anything, and a view as bytes minds them.
        data = cast.contiguous().cpu().view(-1).view(torch.uint8).numpy().data
        self._entries[name] = {
            "dtype": _NAMES[self.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._position, self._position + data.nbytes],
        }
        self._file.write(data)
        self._position += data.nbytes
        anything = bool(cast.any())
        self.empty &= not anything
        return anything

    def finish(self) -> None:
        """Write the header; without it the file is nothing."""
        header = json.dumps(self._entries, separators=(",", ":")).encode()
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._room) + header.ljust(self._room))
        self._file.flush()

    def __enter__(self) -> "TensorStream":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


class AdapterWriter:
    """Writes `adapter_model.safetensors` and `adapter_config.json` into an existing folder; a context manager.

    Args:
        folder: where the two files go.
        modules: every module that will be added, in any order.
        dtype: precision of the factors on disk.
    """

    def __init__(self, folder: Path, modules: Sequence[str], dtype: torch.dtype) -> None:
        self.folder = folder
        self.ranks: dict[str, int] = {}
        self.empty = True
        """Whether no module was written that changes anything."""
        names = [name for module in modules for name in _tensor_names(module)]
        self._stream = TensorStream(folder / WEIGHTS_NAME, names, dtype)

    def add(self, module: str, update: LowRank) -> None:
        """Write the factors of one module. An update of rank 0 goes out as rank 1 of zeros.

        Raises:
            Refused: the values do not fit into the precision on disk.
        """
        if update.rank == 0:
            out_features, in_features = update.shape
            update = LowRank(update.B.new_zeros(out_features, 1), update.A.new_zeros(1, in_features))
        self.ranks[module] = update.rank
        name_a, name_b = _tensor_names(module)
        a, b = self._stream.add(name_a, update.A), self._stream.add(name_b, update.B)
        self.empty &= not (a and b)

    def __enter__(self) -> "AdapterWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.__exit__(*error)

    def finish(self, config: Mapping[str, Any]) -> None:
        """Write the header, and `config` completed with ranks and alphas."""
        self._stream.finish()
        text = json.dumps({**_defaults(), **self._patterns(), **config}, indent=2, sort_keys=True)
        (self.folder / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")

    def _patterns(self) -> dict[str, Any]:
        """Ranks per module as PEFT reads them. Alpha equals the rank everywhere: the factors hold the whole scale."""
        rank = Counter(self.ranks.values()).most_common(1)[0][0]
        others = {module: r for module, r in sorted(self.ranks.items()) if r != rank}
        return {
            "r": rank,
            "lora_alpha": rank,
            "rank_pattern": others,
            "alpha_pattern": others,
        }


def base_entries(base: str) -> dict[str, str]:
    """How a PEFT configuration names the base `name@revision`; without a revision that key is left out."""
    name, revision = split_revision(base)
    return {"base_model_name_or_path": name} | ({"revision": revision} if revision else {})


def target_modules(modules: Sequence[str], *, whole: bool) -> list[str]:
    """How a PEFT configuration names `modules`: by their last parts where those mean the same in the whole base."""
    return sorted({module.rpartition(".")[2] for module in modules}) if whole else sorted(modules)


def _tensor_names(module: str) -> tuple[str, str]:
    return f"{_PREFIX}{module}.lora_A.weight", f"{_PREFIX}{module}.lora_B.weight"


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
