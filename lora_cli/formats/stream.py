"""A safetensors file written tensor by tensor, from tensors or from what other files hold."""

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self

import numpy as np

from lora_cli.errors import DataError, Refused
from lora_cli.formats.header import TensorEntry
from lora_cli.formats.reader import stored_of
from lora_cli.precision import spoken

if TYPE_CHECKING:
    from torch import Tensor

    from lora_cli.formats.numbers import Stored

_CHUNK_BYTES = 1 << 22


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
        stored = stored_of(tensor, self.dtype)
        anything = not stored.zero
        if not stored.finite:
            raise Refused(f"{name}: values overflow {spoken(self.dtype)}", hint="choose a wider --dtype")
        self.put(name, stored)
        self.empty &= not anything
        return anything

    def put(self, name: str, stored: "Stored") -> None:
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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
