"""Whole updates on the disk, as `lora merge --dense` writes them: tensors (out, in) by the names of their weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lora_cli.errors import HeaderError, Refused
from lora_cli.formats.header import TensorEntry, read_header
from lora_cli.formats.kinds import DENSE_FILE
from lora_cli.formats.reader import read_tensor
from lora_cli.formats.run_record import read_record
from lora_cli.hashes import Stamp, opened_as, sha256_of, stamp_of
from lora_cli.precision import FLOATS
from lora_cli.records import AdapterRef, Progress, patient, silent
from lora_cli.settings import folder_of

_SUFFIX = ".weight"
_FLAG = "fan_in_fan_out"


@dataclass(frozen=True, slots=True, eq=False)
class OpenDelta:
    """A dense result whose record and header were read.

    `modules` maps a module's name in the base model to its tensor; `base` is its base model.
    `fan_in_fan_out` is, as in an adapter's configuration, whether the base stores these weights (in, out).
    """

    ref: AdapterRef
    base: str
    fan_in_fan_out: bool
    sha256: str
    file: Path
    stamp: Stamp = field(repr=False)
    modules: Mapping[str, TensorEntry] = field(repr=False)

    @property
    def folder(self) -> Path:
        """The folder of the result."""
        return self.file.parent

    def shape(self, module: str) -> tuple[int, int]:
        """(out, in) of one module."""
        out_features, in_features = self.modules[module].shape
        return out_features, in_features

    def read(self, module: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """The update of one module, (out, in). Refused where it holds NaN or Inf, or where the file was written to."""
        with opened_as(self.file, self.stamp, f"{self.ref.id}: its updates") as file:
            update = read_tensor(file.fileno(), self.modules[module], dtype)
        if not torch.isfinite(update).all():
            raise Refused(f"{self.ref.id}: NaN or Inf in {module}", hint="merge again")
        return update


def dense_folder(name: str) -> Path | None:
    """The folder of a dense result at `name`; None for anything else."""
    folder = folder_of(name)
    return folder if folder is not None and (folder / DENSE_FILE).is_file() else None


def weight_of(module: str) -> str:
    """The tensor's name for a module's update: that of its weight."""
    return module + _SUFFIX


def metadata(*, fan_in_fan_out: bool) -> dict[str, str]:
    """The file's metadata."""
    return {_FLAG: str(fan_in_fan_out).lower()}


def open_delta(folder: Path, progress: Progress = silent) -> OpenDelta:
    """Read record and header of a dense result; the updates stay on disk.

    Raises:
        DataError, HeaderError: a file that is missing or malformed.
        Refused: the file differs from its record.
    """
    record, file = read_record(folder), folder / DENSE_FILE
    opened = stamp_of(file)
    name = "/".join(folder.resolve().parts[-2:]).lstrip("/")
    sha256 = sha256_of(file, patient(progress))
    try:
        base, wanted = str(record["settings"]["base"]), record["outputs"][DENSE_FILE]
    except (KeyError, TypeError):
        raise Refused(f"{name}: its run.json is not that of a dense merge", hint="merge again with --dense") from None
    if sha256 != wanted:
        raise Refused(f"{name}: {DENSE_FILE} changed since it was written", hint="merge again with --dense --force")
    header = read_header(file)
    for tensor in header.tensors.values():
        if not tensor.name.endswith(_SUFFIX) or len(tensor.shape) != 2 or tensor.dtype not in FLOATS:
            raise HeaderError(f"{name}: {tensor.name} is not the update of a weight")
    return OpenDelta(
        AdapterRef(id=name, commit=sha256[:40], source="folder", repo=str(folder.resolve())),
        base=base,
        fan_in_fan_out=header.metadata.get(_FLAG) == "true",
        sha256=sha256,
        file=file,
        stamp=opened,
        modules={tensor.name.removesuffix(_SUFFIX): tensor for tensor in header.tensors.values()},
    )
