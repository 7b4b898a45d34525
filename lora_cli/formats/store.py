"""The files of an adapter in a folder or in the Hub's cache. Nothing is downloaded, and no pickle is opened."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from lora_cli.errors import NothingMatched
from lora_cli.files import read_regular, unreadable
from lora_cli.formats.config import MAX_CONFIG_BYTES
from lora_cli.formats.kinds import CONFIG_NAME, WEIGHTS_NAME
from lora_cli.hashes import sha256_of
from lora_cli.records import AdapterRef
from lora_cli.settings import folder_of


@dataclass(frozen=True)
class AdapterFiles:
    """The two files of one adapter on this machine."""

    ref: AdapterRef
    config: Path
    weights: Path


def locate(ref: AdapterRef) -> AdapterFiles | None:
    """The files of `ref` where both are on this machine, else None. DataError for a folder that is locked."""
    names = [f"{ref.subfolder}/{name}" if ref.subfolder else name for name in (CONFIG_NAME, WEIGHTS_NAME)]
    if ref.source == "hub":
        from lora_cli.hub import cache as hub

        config, weights = hub.cached_files(ref.repo, names, ref.commit)
    else:
        config, weights = (_if_there(Path(ref.repo, name)) for name in names)
    return None if config is None or weights is None else AdapterFiles(ref, config, weights)


def _if_there(path: Path) -> Path | None:
    """`path` if it is that of a file. DataError for one in a folder that is locked."""
    try:
        return path if path.is_file() else None
    except OSError as error:
        raise unreadable(path, error) from error


def folder_ref(path: Path, id: str = "") -> AdapterRef:
    """The adapter in the folder `path`, named `id` or else by the last two parts of its path.

    Its commit is the head of a SHA-256 over the configuration's bytes and the weights' own SHA-256, either empty where
    the file is missing. Raises NothingMatched where there is no such folder, DataError for a file that is locked.
    """
    found = folder_of(str(path))
    if found is None:
        raise NothingMatched(f"no folder {path}")
    folder = found.resolve()
    digest = hashlib.sha256(read_config(folder) or b"")
    weights = folder / WEIGHTS_NAME
    digest.update(sha256_of(weights).encode() if weights.is_file() else b"")
    return AdapterRef(
        id=id or "/".join(folder.parts[-2:]).lstrip("/"),
        commit=digest.hexdigest()[:40],
        source="folder",
        repo=str(folder),
    )


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
