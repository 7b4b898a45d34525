"""The header of a safetensors file from a stranger: strict, bounded in time and memory, no tensor data read.

Stricter than the safetensors library: all that it rejects is rejected here, and also headers over 8 MB, more than
50,000 tensors, repeated names and extra keys. Format: https://github.com/huggingface/safetensors (README, "Format").
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from lora_cli.errors import HeaderError
from lora_cli.files import open_regular, unreadable
from lora_cli.hashes import Stamp, stamp
from lora_cli.precision import BITS
from lora_cli.text import shortened

MAX_HEADER_BYTES: Final = 8 * 1024 * 1024
MAX_TENSORS: Final = 50_000
MAX_METADATA_BYTES: Final = 1024 * 1024
MAX_NAME: Final = 1_000
MAX_DIMENSIONS: Final = 8

_MAX_ELEMENTS = 2**53  # products stay far below the 64-bit overflow that the library refuses
_MAX_ENTRY_BYTES = 8_192

# Only single characters are repeated possessively: Python before 3.11.5 gets groups wrong. Other repeats are bounded,
# so that a hostile header costs neither backtracking nor a stack of saved positions.
_TO_TEXT = re.compile(rb'[^"{}\[\]]*+(["}]?)')
_REST_OF_TEXT = re.compile(rb'[^"\\\x00-\x1f]*+(["\\]?)')
_NAME = rb'"[^"\\\x00-\x1f]*+(?:\\.[^"\\\x00-\x1f]*+){0,%d}"' % MAX_NAME
_KEY = re.compile(rb"[ \t\r\n]*+(" + _NAME + rb")[ \t\r\n]*+:[ \t\r\n]*+")
_ENTRY_OBJECT = re.compile(rb"\{[^{}]*+\}")
_NEXT = re.compile(rb"[ \t\r\n]*+([,}])")
_NULL = b"null"  # what mlx writes where it was given no metadata
_BLANK = re.compile(rb"[ \t\r\n]*+")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor: `begin` and `end` are byte offsets in the file (not, as in the header, after the header)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, eq=False)
class Header:
    """The tensors of one file by name, in the order of their bytes. Compared by identity: `read_header` reads once."""

    tensors: Mapping[str, TensorEntry]
    file_size: int
    metadata: Mapping[str, str] = field(default_factory=dict)


def header_length(first8: bytes, file_size: int) -> int:
    """The length in bytes of the JSON header (which starts at byte 8), from the file's first 8 bytes.

    Raises HeaderError where it is over the limit or does not fit into the file.
    """
    if first8 == b"version ":
        raise HeaderError("weights are a Git LFS pointer", hint="the file was never fetched: run `git lfs pull` there")
    if len(first8) < 8 or file_size < 8:
        raise HeaderError(f"truncated: a safetensors file has at least 10 bytes, this one has {file_size:,}")
    length = int.from_bytes(first8[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise HeaderError(f"not a safetensors file: it claims a header of {length:,} bytes")
    if length > file_size - 8:
        raise HeaderError(f"truncated: header says {length + 8:,} bytes or more, file has {file_size:,}")
    return length


def parse_header(data: bytes, file_size: int) -> Header:
    """The header in `data`, the first bytes of a file of `file_size` bytes (all of the header must be there).

    Raises HeaderError, and nothing else, on anything the safetensors library or the limits of this module reject.
    """
    length = header_length(data[:8], file_size)
    if len(data) < 8 + length:
        raise HeaderError(f"incomplete: the header ends at byte {8 + length:,}, {len(data):,} bytes are at hand")
    raw = bytes(data[8 : 8 + length])
    tensors: dict[str, TensorEntry] = {}
    metadata: dict[str, str] | None = None
    for name, body in _top_level(raw):
        if name == "__metadata__":
            if metadata is not None:
                raise HeaderError("malformed: __metadata__ is given twice")
            metadata = _metadata(body)
            continue
        if name in tensors:
            raise HeaderError(f"malformed: the tensor {shortened(name)} is given twice")
        if len(tensors) == MAX_TENSORS:
            raise HeaderError(f"more than {MAX_TENSORS:,} tensors")
        tensors[name] = _entry(name, body, 8 + length)
    return Header(tensors=_contiguous(tensors, 8 + length, file_size), file_size=file_size, metadata=metadata or {})


def read_header(path: Path) -> Header:
    """The header of the file at `path`; raises HeaderError, or DataError where the file cannot be read.

    A file that is as it was when this process read its header is not read again.
    """
    try:
        return _header_of(path.absolute(), stamp(path.stat()))
    except OSError as error:
        raise unreadable(path, error) from error


@lru_cache(maxsize=16)
def _header_of(path: Path, state: Stamp) -> Header:
    with open_regular(path) as file:
        file_size = file.seek(0, 2)
        file.seek(0)
        first8 = file.read(8)
        return parse_header(first8 + file.read(header_length(first8, file_size)), file_size)


def _top_level(raw: bytes) -> Iterable[tuple[str, bytes]]:
    """Name and object of each member of the outermost object, one at a time: the whole is never built."""
    if raw[:1] != b"{":
        raise HeaderError("malformed: the header is not a JSON object")
    at = 1
    if blank := _BLANK.match(raw, at):
        at = blank.end()
    if raw[at : at + 1] == b"}":
        _nothing_after(raw, at + 1)
        return
    while True:
        key = _KEY.match(raw, at)
        if key is None or len(key[1]) > 6 * MAX_NAME:
            raise HeaderError(f"malformed: no usable tensor name at byte {8 + at:,}")
        name = _json(key[1], at)
        if name != "__metadata__" and (len(name) > MAX_NAME or not name.isprintable()):
            raise HeaderError(f"malformed: no usable tensor name at byte {8 + at:,}")
        end = (_end_of_metadata if name == "__metadata__" else _end_of_entry)(raw, key.end())
        if end is None:
            raise HeaderError(f"malformed: {shortened(name)} does not describe a tensor")
        yield name, raw[key.end() : end]
        after = _NEXT.match(raw, end)
        if after is None:
            raise HeaderError(f"malformed: not JSON at byte {8 + end:,}")
        at = after.end()
        if after[1] == b"}":
            _nothing_after(raw, at)
            return


def _end_of_entry(raw: bytes, at: int) -> int | None:
    """The place behind a tensor's object, which begins at `at`; None for anything else."""
    found = _ENTRY_OBJECT.match(raw, at)
    return None if found is None else found.end()


def _end_of_metadata(raw: bytes, at: int) -> int | None:
    """The place behind an object of texts or a null, which begins at `at`; None for anything else."""
    if raw.startswith(_NULL, at):
        return at + len(_NULL)
    begin, inside = at, False
    if raw[at : at + 1] != b"{":
        return None
    at += 1
    while (mark := (_REST_OF_TEXT if inside else _TO_TEXT).match(raw, at)) is not None and mark[1]:
        at = mark.end()
        if at - begin > MAX_METADATA_BYTES:
            raise HeaderError(f"malformed: __metadata__ has more than {MAX_METADATA_BYTES:,} bytes")
        if mark[1] == b"}":
            return at
        if mark[1] == b'"':
            inside = not inside
        else:  # a backslash, and whatever it stands before
            at += 1
    return None


def _nothing_after(raw: bytes, at: int) -> None:
    blank = _BLANK.match(raw, at)
    if blank is None or blank.end() != len(raw):
        raise HeaderError(f"malformed: something follows the header's object at byte {8 + at:,}")


def _unsigned(text: str) -> int:
    if text.startswith("-") or len(text) > 16:
        raise HeaderError(f"malformed: {shortened(text)} is no size or offset")
    return int(text)


def _no_float(text: str) -> int:
    raise HeaderError(f"malformed: {shortened(text)} is no size or offset")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise HeaderError("malformed: a key is given twice")
    return found


_DECODER = json.JSONDecoder(
    parse_int=_unsigned, parse_float=_no_float, parse_constant=_no_float, object_pairs_hook=_no_duplicates
)


def _json(text: bytes, at: int) -> Any:
    try:
        value = _DECODER.decode(text.decode())
        if isinstance(value, str):
            value.encode()
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"malformed: not JSON at byte {8 + at:,}") from error
    return value


def _metadata(body: bytes) -> dict[str, str]:
    if body == _NULL:
        return {}
    found = _json(body, 0)
    if not all(isinstance(value, str) for value in found.values()):
        raise HeaderError("malformed: __metadata__ holds something other than text")
    try:
        for key, value in found.items():
            key.encode()
            value.encode()
    except UnicodeError as error:
        raise HeaderError("malformed: __metadata__ is not Unicode text") from error
    return dict(found)


def _entry(name: str, body: bytes, data_start: int) -> TensorEntry:
    if len(body) > _MAX_ENTRY_BYTES:
        raise HeaderError(f"malformed: the entry of {shortened(name)} has {len(body):,} bytes")
    described = _json(body, 0)
    if described.keys() != {"dtype", "shape", "data_offsets"}:
        raise HeaderError(f"malformed: {shortened(name)} has other keys than dtype, shape and data_offsets")
    dtype, shape, offsets = described["dtype"], described["shape"], described["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise HeaderError(f"{shortened(name)} has the unknown dtype {shortened(dtype)}")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise HeaderError(f"malformed: the shape of {shortened(name)}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise HeaderError(f"malformed: the offsets of {shortened(name)}")
    elements = 1
    for size in shape:
        elements *= size
        if elements > _MAX_ELEMENTS:
            raise HeaderError(f"malformed: the shape of {shortened(name)} is too large")
    begin, end = offsets
    size, rest = divmod(elements * BITS[dtype], 8)
    if rest:
        raise HeaderError(f"malformed: {shortened(name)} is {dtype} {shape}, which ends inside a byte")
    if end - begin != size:
        raise HeaderError(
            f"malformed: {shortened(name)} is {dtype} {shape}, {size:,} bytes, but its offsets span {end - begin:,}"
        )
    return TensorEntry(name, dtype, tuple(shape), data_start + begin, data_start + end)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(size, int) and not isinstance(size, bool) for size in value)


def _contiguous(tensors: dict[str, TensorEntry], data_start: int, file_size: int) -> dict[str, TensorEntry]:
    """The tensors in the order of their bytes; raises HeaderError where they leave holes, overlap or miss the end."""
    ordered = sorted(tensors.values(), key=lambda entry: (entry.begin, entry.end))
    at = data_start
    for entry in ordered:
        if entry.begin != at:
            raise HeaderError(
                f"malformed: {shortened(entry.name)} leaves a hole in the file or overlaps another tensor"
            )
        at = entry.end
    if at > file_size:
        raise HeaderError(f"truncated: header says {at:,} bytes, file has {file_size:,}")
    if at < file_size:
        raise HeaderError(f"malformed: header says {at:,} bytes, file has {file_size:,}")
    return {entry.name: entry for entry in ordered}
