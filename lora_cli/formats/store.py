"""The files of an adapter in a folder or in the Hub's cache. Nothing is downloaded, and no pickle is opened."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from lora_cli.errors import NothingMatched
from lora_cli.files import open_regular
from lora_cli.formats.config import MAX_CONFIG_BYTES
from lora_cli.formats.header import reading
from lora_cli.formats.kinds import CONFIG_NAME, WEIGHTS_NAME
from lora_cli.hashes import file_sha256
from lora_cli.records import AdapterRef, Progress, silent
from lora_cli.settings import folder_of


@dataclass(frozen=True)
class AdapterFiles:
    """The two files of one adapter on this machine."""

    ref: AdapterRef
    config: Path
    weights: Path


def locate(ref: AdapterRef) -> AdapterFiles | None:
    """The files of `ref` where both are on this machine, else None. DataError for a folder that is locked."""
    found = [_file(ref, name) for name in (CONFIG_NAME, WEIGHTS_NAME)]
    config, weights = found
    if config is None or weights is None:
        return None
    return AdapterFiles(ref, config, weights)


def _file(ref: AdapterRef, name: str) -> Path | None:
    if ref.source == "hub":
        from lora_cli.hub import cache as hub

        return hub.cached_file(ref.repo, f"{ref.subfolder}/{name}" if ref.subfolder else name, ref.commit)
    path = Path(ref.repo, ref.subfolder, name)
    with reading(path):
        return path if path.is_file() else None


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
    with reading(path):
        if not path.is_file():
            return None
        with open_regular(path) as file:
            return file.read(MAX_CONFIG_BYTES + 1)


def sha256_of(path: Path, progress: Progress = silent) -> str:
    """The SHA-256 of a file's bytes, as 64 hex digits. DataError where they cannot be read.

    An unchanged file that this process has hashed already is not read again.
    """
    with reading(path):
        return file_sha256(path, progress)
