"""The header of a GGUF file from a stranger, versions 2 and 3: bounded in time and memory, no tensor data read.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Numbers are little-endian; the dimensions of a tensor
stand there from the fastest to the slowest.
"""

import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

from lora_cli.errors import HeaderError
from lora_cli.files import open_regular, unreadable
from lora_cli.formats.header import MAX_DIMENSIONS, MAX_NAME, MAX_TENSORS, Header, TensorEntry
from lora_cli.hashes import stamp
from lora_cli.imports import Tensors
from lora_cli.precision import BITS
from lora_cli.text import shortened

MAX_HEADER_BYTES: Final = 32 * 1024 * 1024
_MAX_KEYS: Final = 10_000
_MAX_ELEMENTS: Final = 2**53
_MAGIC: Final = b"GGUF"
_STRING, _ARRAY = 8, 9
# The other types of values by number, as struct writes them: integers, floats, one byte for true and false.
_NUMBERS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
# The types of tensors that are plain floats, by number.
_FLOATS: Final = {0: "F32", 1: "F16", 28: "F64", 30: "BF16"}

Value = str | int | float | bool


class Gguf(NamedTuple):
    """The values of a GGUF file's header, an array as words, and its tensors, which are all floats."""

    values: Mapping[str, Value]
    tensors: Tensors


def read_gguf(path: Path) -> Gguf:
    """The header of the file at `path`.

    Raises HeaderError for what is no GGUF file of versions 2 or 3, is cut off or over the limits, names anything twice,
    or holds quantised tensors. Raises DataError where the file cannot be read.
    """
    try:
        with open_regular(path) as file:
            size = file.seek(0, 2)
            file.seek(0)
            known = stamp(os.fstat(file.fileno()))
            data = _Bytes(file.read(min(size, MAX_HEADER_BYTES)), size)
    except OSError as error:
        raise unreadable(path, error) from error
    if data.take(4) != _MAGIC:
        raise HeaderError("not a GGUF file")
    version = data.number("I")
    if version not in (2, 3):
        raise HeaderError(f"GGUF version {version}; 2 and 3 are read")
    tensors, keys = data.number("Q"), data.number("Q")
    if tensors > MAX_TENSORS or keys > _MAX_KEYS:
        raise HeaderError(f"malformed: it claims {tensors:,} tensors and {keys:,} values")
    values = _values(data, keys)
    alignment = values.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 2**20 or alignment & (alignment - 1):
        raise HeaderError(f"malformed: an alignment of {alignment}")
    raw = [_tensor(data) for _ in range(tensors)]
    begin = -(-data.at // alignment) * alignment
    entries: dict[str, TensorEntry] = {}
    for name, kind, shape, offset in raw:
        if name in entries:
            raise HeaderError(f"malformed: the tensor {shortened(name)} is given twice")
        length = math.prod(shape) * BITS[kind] // 8
        if offset % alignment or begin + offset + length > size:
            raise HeaderError(f"truncated: {shortened(name)} ends at byte {begin + offset + length:,} of {size:,}")
        entries[name] = TensorEntry(name, kind, shape, begin + offset, begin + offset + length)
    return Gguf(values, Tensors(path, Header(entries, size), known))


class _Bytes:
    """The first bytes of a file, read from front to back."""

    def __init__(self, data: bytes, size: int) -> None:
        self.at = 0
        self._data, self._size = data, size

    def take(self, count: int) -> bytes:
        """The next bytes. HeaderError where the file or the limit ends before them."""
        if self.at + count > len(self._data):
            whole = self._size == len(self._data)
            limit = f"malformed: a header of more than {MAX_HEADER_BYTES:,} bytes"
            raise HeaderError("truncated: the file ends inside its header" if whole else limit)
        self.at += count
        return self._data[self.at - count : self.at]

    def number(self, form: str) -> int:
        """The next number of a form of struct's."""
        [found] = struct.unpack(f"<{form}", self.take(struct.calcsize(form)))
        return int(found)

    def text(self, most: int) -> str:
        """The next string. HeaderError for one that is too long or no UTF-8."""
        length = self.number("Q")
        if length > most:
            raise HeaderError(f"malformed: a text of {length:,} bytes")
        try:
            return self.take(length).decode()
        except UnicodeError as error:
            raise HeaderError("malformed: a text that is not UTF-8") from error


def _values(data: _Bytes, count: int) -> dict[str, Value]:
    found: dict[str, Value] = {}
    for _ in range(count):
        key = data.text(MAX_NAME)
        if key in found:
            raise HeaderError(f"malformed: the value {shortened(key)} is given twice")
        kind = data.number("I")
        if kind == _ARRAY:
            found[key] = _array(data)
        elif kind == _STRING:
            found[key] = data.text(MAX_HEADER_BYTES)
        elif kind in _NUMBERS:
            [found[key]] = struct.unpack(f"<{_NUMBERS[kind]}", data.take(struct.calcsize(_NUMBERS[kind])))
        else:
            raise HeaderError(f"malformed: {shortened(key)} has a value of type {kind}")
    return found


def _array(data: _Bytes) -> str:
    """The length of an array in words; the array is passed over."""
    kind, count = data.number("I"), data.number("Q")
    if kind in _NUMBERS:
        data.take(count * struct.calcsize(_NUMBERS[kind]))
    elif kind == _STRING:
        for _ in range(count):
            data.take(data.number("Q"))
    else:
        raise HeaderError(f"malformed: an array of values of type {kind}")
    return f"an array of {count:,}"


def _tensor(data: _Bytes) -> tuple[str, str, tuple[int, ...], int]:
    """Name, precision, shape (slowest dimension first) and offset of the next tensor."""
    name, dimensions = data.text(MAX_NAME), data.number("I")
    if not name.isprintable() or dimensions > MAX_DIMENSIONS:
        raise HeaderError("malformed: no usable name or shape of a tensor")
    shape = tuple(data.number("Q") for _ in range(dimensions))[::-1]
    kind, offset = data.number("I"), data.number("Q")
    if math.prod(shape) > _MAX_ELEMENTS:
        raise HeaderError(f"malformed: the shape of {shortened(name)} is too large")
    if kind not in _FLOATS:
        raise HeaderError(
            f"{shortened(name)} is quantised (type {kind} of ggml): factors must be floats",
        )
    return name, _FLOATS[kind], shape, offset
