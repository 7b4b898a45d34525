"""The files of an adapter in a folder or in the Hub's cache. Nothing is downloaded, and no pickle is opened."""

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lora_cli.errors import ConfigError, DataError, NothingMatched, Refused
from lora_cli.files import read_regular, unreadable
from lora_cli.formats.config import MAX_CONFIG_BYTES, parse_config
from lora_cli.formats.kinds import CONFIG_NAME, WEIGHTS_NAME, kind_in
from lora_cli.hashes import sha256_of
from lora_cli.imports import Found, find
from lora_cli.records import AdapterRef
from lora_cli.settings import folder_of


@dataclass(frozen=True)
class AdapterFiles:
    """The two files of one adapter on this machine, made from those of another program where `kind` says so."""

    ref: AdapterRef
    config: Path
    weights: Path
    kind: str = ""


class FolderFiles(NamedTuple):
    """The configuration's bytes and the weights of a folder, None where they are missing.

    Of an adapter that another program wrote they are those of its conversion, and `converted` names the program. `kind`
    says what the folder holds instead of an adapter, "" if that is not known.
    """

    config: bytes | None
    weights: Path | None
    converted: str = ""
    kind: str = ""


def files_in(folder: Path, names: Collection[str]) -> FolderFiles:
    """The files of the adapter in a folder, which holds files of these names. DataError for one that is locked."""
    weights, config = folder / WEIGHTS_NAME, read_config(folder)
    found = _foreign(folder, config)
    if found is None and WEIGHTS_NAME in names and weights.is_file():
        return FolderFiles(config, weights)
    if found is None:
        return FolderFiles(config, None, kind=kind_in(folder, names))
    from lora_cli.imports._cached import converted

    try:
        made = converted(found)
    except Refused as error:
        return FolderFiles(None, None, kind=error.message)
    return FolderFiles(read_config(made), made / WEIGHTS_NAME, found.by.program)


def locate(ref: AdapterRef) -> AdapterFiles | None:
    """The files of `ref` where both are on this machine, else None.

    Of an adapter that another program wrote they are in the cache of this tool, made now if they are not there.

    Raises:
        DataError: a folder that is locked. Refused: an adapter of another program that PEFT cannot represent.
    """
    names = [f"{ref.subfolder}/{name}" if ref.subfolder else name for name in (CONFIG_NAME, WEIGHTS_NAME)]
    if ref.source == "hub":
        from lora_cli.hub import cache as hub

        config, weights = hub.cached_files(ref.repo, names, ref.commit)
    else:
        config, weights = (_if_there(Path(ref.repo, name)) for name in names)
        if (found := _foreign(Path(ref.repo), read_config(Path(ref.repo)))) is not None:
            from lora_cli.imports._cached import converted

            folder = converted(found)
            return AdapterFiles(ref, folder / CONFIG_NAME, folder / WEIGHTS_NAME, found.by.program)
    return None if config is None or weights is None else AdapterFiles(ref, config, weights)


def _if_there(path: Path) -> Path | None:
    """`path` if it is that of a file. DataError for one in a folder that is locked."""
    try:
        return path if path.is_file() else None
    except OSError as error:
        raise unreadable(path, error) from error


def folder_ref(path: Path, id: str = "") -> AdapterRef:
    """The adapter in the folder `path`, named `id` or else by the last two parts of its path.

    `path` may also be the one file of an adapter that another program wrote. The commit is the head of a SHA-256 over
    the configuration's bytes and the weights' own SHA-256, either empty where the file is missing; of another
    program's adapter, over its files. Raises NothingMatched where there is no such folder, DataError for a file that
    is locked.
    """
    at = folder_of(str(path))
    config = None if at is None else read_config(at)
    found = _foreign(at or path, config)
    weights = None if at is None else at / WEIGHTS_NAME
    if at is None and found is None:
        raise NothingMatched(f"no folder {path}")
    folder = (at or path).resolve()
    if found is not None:
        from lora_cli.imports._cached import commit_of

        commit = commit_of(found)
    else:
        digest = hashlib.sha256(config or b"")
        digest.update(sha256_of(weights).encode() if weights is not None and weights.is_file() else b"")
        commit = digest.hexdigest()[:40]
    return AdapterRef(
        id=id or "/".join(folder.parts[-2:]).lstrip("/"),
        commit=commit,
        source="folder",
        repo=str(folder),
    )


def _foreign(path: Path, config: bytes | None) -> Found | None:
    """The adapter at a path if it is one of another program, or of PEFT but no LoRA; `config` is that of the folder."""
    try:
        if not (path / WEIGHTS_NAME).is_file():
            return find(path)
        return find(path) if config is not None and parse_config(config).peft_type != "LORA" else None
    except (DataError, ConfigError, OSError):
        return None


def read_config(folder: Path) -> bytes | None:
    """The bytes of a folder's adapter_config.json, None where there is none.

    Of a file over `MAX_CONFIG_BYTES` only one byte more than that is read: `parse_config` refuses it by its length.
    Raises DataError for one that cannot be read.
    """
    path = folder / CONFIG_NAME
    try:
        return read_regular(path, MAX_CONFIG_BYTES + 1) if path.is_file() else None
    except OSError as error:
        raise unreadable(path, error) from error
