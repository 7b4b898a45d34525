"""A whole model on the disk: safetensors files and the files beside them. No tensor is ever read in full.

The layout is that of transformers: `model.safetensors`, or parts that `model.safetensors.index.json` names.
"""

import hashlib
import json
import struct
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

import torch
from torch import Tensor

from lora_cli.errors import HeaderError, NetworkError, NothingMatched, Refused, UsageError
from lora_cli.formats.base_files import (
    AGAIN,
    CONFIG,
    TEMPLATES,
    base_files,
    files_beside,
    files_in,
    going_along,
    json_object,
    read_config,
)
from lora_cli.formats.base_names import MAIN, at_revision, split_revision
from lora_cli.formats.header import Header, TensorEntry, read_header
from lora_cli.hashes import sha256_of_all
from lora_cli.hub.cache import cached_file
from lora_cli.names import is_model, is_revision
from lora_cli.precision import BITS, torch_dtype
from lora_cli.records import Progress, patient, silent
from lora_cli.settings import folder_of, folders_like, means_folder
from lora_cli.text import meant, shortened

WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
BLOCK: Final = 1 << 20
"""Entries per block; a longer row is a block of its own."""

_PICKLES: Final = frozenset((".bin", ".ckpt", ".pt", ".pth"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A model whose configuration and headers were read.

    `headers` is by file name, `tensors` maps each tensor that loading would read to its file. `beside` are
    the files that belong to the weights: configuration, tokenizer, chat template, licence; never code.
    """

    folder: Path
    config: Mapping[str, Any]
    index: Mapping[str, Any] | None
    headers: Mapping[str, Header]
    tensors: Mapping[str, str]
    beside: tuple[Path, ...]

    def entry(self, tensor: str) -> TensorEntry:
        """Dtype, shape and place of one tensor."""
        return self.headers[self.tensors[tensor]].tensors[tensor]


def open_checkpoint(folder: Path, name: str) -> Checkpoint:
    """Read configuration, index and headers of a model, but no tensors; `name` is its name in messages.

    Raises:
        Refused: weights that are pickled, incomplete or absent; a malformed configuration or index; see `base_files`.
        HeaderError: a malformed safetensors file, with the model's name.
        DataError: a file that cannot be read.
    """
    config, beside = read_config(folder, name), files_beside(folder, name)
    index = None
    names = {file.name for file in files_in(folder)}
    if WEIGHTS in names:
        headers = {WEIGHTS: _part(folder / WEIGHTS, name)}
        tensors = dict.fromkeys(headers[WEIGHTS].tensors, WEIGHTS)
    elif INDEX in names:
        index = json_object(folder / INDEX, name)
        tensors = _weight_map(index, name)
        headers = {part: _part(folder / part, name) for part in sorted(set(tensors.values()))}
    else:
        raise _without_weights(folder, name)
    for tensor, part in tensors.items():
        if tensor not in headers[part].tensors:
            raise Refused(f"{name}: {shortened(tensor)} is not in {part}", hint=AGAIN)
    return Checkpoint(
        folder=folder,
        config=config,
        index=index,
        headers=headers,
        tensors=tensors,
        beside=beside,
    )


class HubModel(NamedTuple):
    """A possible model on the Hub: its id and a branch, tag or commit."""

    repo: str
    revision: str = MAIN

    def __str__(self) -> str:
        return at_revision(*self)


def folder_or_hub(name: str) -> Path | HubModel:
    """A model's folder, or a possible id on the Hub: `owner/name` or `owner/name@revision`.

    NothingMatched for anything else, such as a mistyped folder, with folders of a like name.
    """
    folder = folder_of(name)
    if folder is not None:
        if not (folder / CONFIG).is_file():
            raise NothingMatched(f"{name} holds no model: {CONFIG} is missing", hint="name the model's own folder")
        return folder
    repo, revision = split_revision(name)
    if not is_model(repo) or (means_folder(name) and not _in_cache(repo)):
        raise _no_folder(name)
    if not is_revision(revision or MAIN):
        raise NothingMatched(f"{repo} has no revision {revision!r}", hint="name a branch, a tag or a commit after @")
    return HubModel(repo, revision or MAIN)


def _in_cache(repo: str) -> bool:
    with suppress(UsageError):
        return cached_file(repo, CONFIG) is not None
    return False


def _no_folder(name: str) -> NothingMatched:
    like = folders_like(name)
    hint = meant(like, "set base to a Hub id or an existing folder")
    if name.count("/") == 1 and name[0] not in "./~" and name[-1] != "/":
        hint += f" · for the Hub's model run hf download {name}"
    return NothingMatched(f"no base model at {name}: no such folder", hint=hint)


@contextmanager
def or_a_folder_like(name: str) -> Iterator[None]:
    """Add the folders of a name like `name` to an error of the Hub about `name`."""
    try:
        yield
    except (NothingMatched, NetworkError) as error:
        if not (like := folders_like(name)):
            raise
        hint = f"did you mean the folder {' or '.join(like)}? · {error.hint}"
        raise type(error)(error.message, hint=hint) from error


def cached_model(repo: str, version: str = MAIN, *, tokenizer: bool = True, weights: bool = True) -> Path | None:
    """The folder of a model in the Hub client's cache, by default at its commit of main; None unless complete.

    tokenizer, weights: whether a complete model must have these.
    """
    config = cached_file(repo, CONFIG, version)
    if config is None or (tokenizer and cached_file(repo, "tokenizer_config.json", version) is None):
        return None
    if not weights:
        return config.parent
    parts = {WEIGHTS}
    # An index names every part of split weights.
    if (index := cached_file(repo, INDEX, version)) and not cached_file(repo, WEIGHTS, version):
        parts = set(_weight_map(json_object(index, repo), repo).values())
    return config.parent if all(cached_file(repo, part, version) for part in parts) else None


def wanted_files(files: Collection[str], index: Path | None, name: str) -> list[str]:
    """The files in a model's repository that a local copy needs, weights last.

    Args:
        index: the model's index, if its weights are split.
        name: the model's name in messages.
    """
    top = [file for file in map(Path, files) if str(file.parent) in (".", TEMPLATES)]
    other = sorted(map(str, going_along(top)))
    if index is None:
        return [*other, WEIGHTS] if WEIGHTS in files else other
    return [*other, INDEX, *sorted(set(_weight_map(json_object(index, name), name).values()))]


def version_of_folder(folder: Path, progress: Progress = silent) -> str:
    """The head of a SHA-256 over the files that loading reads: 40 hex digits.

    Takes a second per gigabyte or so.
    """
    report = patient(progress)
    files = base_files(folder)
    hashes = zip(files, sha256_of_all(files, report), strict=True)
    text = "".join(f"{file.relative_to(folder).as_posix()}\n{sha256}\n" for file, sha256 in hashes)
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:40]


def blocks(file: BufferedReader, entry: TensorEntry, columns: int) -> Iterator[tuple[int, bytearray]]:
    """The bytes of one tensor, whole rows of `columns` entries at a time: (first row, its and the next rows' bytes).

    Raises:
        Refused: the file ends inside the tensor.
    """
    file.seek(entry.begin)
    size, row = 8 * (entry.end - entry.begin), columns * BITS[entry.dtype]
    rows = max(1, BLOCK // columns)
    for at in range(0, size // row, rows):
        block = bytearray(min(rows * row, size - at * row) // 8)
        done = 0
        while done < len(block):
            count = file.readinto(memoryview(block)[done:])
            if not count:
                raise Refused(f"{shortened(entry.name)}: the file ends inside this tensor")
            done += count
        yield at, block


def as_tensor(block: bytearray, dtype: str) -> Tensor:
    """The entries of a block, (entries,), sharing its memory."""
    return torch.frombuffer(block, dtype=torch_dtype(dtype))


class ShardWriter:
    """Writes one safetensors file, bytes in the order of its tensors; a context manager that computes the SHA-256.

    Args:
        path: the file to write.
        like: the file from which names, shapes, order and metadata are taken.
        dtypes: the new dtypes of tensors that change their precision.
    """

    def __init__(self, path: Path, like: Header, dtypes: Mapping[str, str]) -> None:
        text, self.bytes = _header_text(like, dtypes)
        self._sha256 = hashlib.sha256()
        self._file: BinaryIO = path.open("wb")
        self.write(struct.pack("<Q", len(text)) + text)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append bytes."""
        self._sha256.update(data)
        self._file.write(data)

    @property
    def sha256(self) -> str:
        """The hash of all written bytes, 64 hex digits."""
        return self._sha256.hexdigest()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def size_of(entry: TensorEntry, dtype: str) -> int:
    """The bytes of a tensor once it is stored as `dtype`."""
    return (entry.end - entry.begin) * BITS[dtype] // BITS[entry.dtype]


def _header_text(like: Header, dtypes: Mapping[str, str]) -> tuple[bytes, int]:
    """The header, filled up with spaces to a multiple of 8 bytes, and the bytes of the tensors behind it."""
    entries: dict[str, Any] = {"__metadata__": dict(like.metadata)} if like.metadata else {}
    position = 0
    for name, entry in like.tensors.items():
        dtype = dtypes.get(name, entry.dtype)
        end = position + size_of(entry, dtype)
        entries[name] = {"dtype": dtype, "shape": list(entry.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    return text.ljust(-(-len(text) // 8) * 8), position


def _weight_map(index: Mapping[str, Any], name: str) -> dict[str, str]:
    """Tensor → file of an index; Refused unless every file is a plain name, so that none is outside the folder."""
    found = index.get("weight_map")
    if not isinstance(found, dict) or not found:
        raise Refused(f"{name}: {INDEX} has no weight_map", hint=AGAIN)
    for part in found.values():
        if not isinstance(part, str) or not part.endswith(".safetensors") or "/" in part or not part.isprintable():
            raise Refused(f"{name}: {INDEX} names {shortened(part)}, which is no file beside it")
    return found


def _part(path: Path, name: str) -> Header:
    if not path.is_file():
        raise Refused(f"{name}: {path.name} is missing", hint=AGAIN)
    try:
        return read_header(path)
    except HeaderError as error:
        raise HeaderError(f"{name}: {path.name}: {error.message}", hint=error.hint or AGAIN) from error


def _without_weights(folder: Path, name: str) -> Refused:
    if pickled := [file.name for file in files_in(folder) if file.suffix in _PICKLES]:
        return Refused(
            f"{name} has its weights as {pickled[0]} only, a pickle, which could run code when it is opened",
            hint="use a base that has safetensors weights",
        )
    return Refused(f"{name} has no {WEIGHTS}", hint="use a base that has safetensors weights")
