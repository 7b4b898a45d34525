"""The Hub client's cache: its place, the files in it, and the hashes that name them; its library without a network."""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_cli.files import open_regular
from lora_cli.hashes import file_sha256
from lora_cli.hub.problems import raise_translated


def cache_folder() -> Path:
    """The Hub client's own cache: HF_HUB_CACHE, else HF_HOME/hub, else its default."""
    if folder := os.environ.get("HF_HUB_CACHE"):
        return Path(folder).expanduser()
    if folder := os.environ.get("HF_HOME"):
        return Path(folder).expanduser() / "hub"
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def cached_file(repo: str, filename: str, commit: str = "main") -> Path | None:
    """The path of a file at a commit in the Hub client's cache; None if it is not there. Sends nothing.

    "main" is the commit that the cache last saw under that name: for display only, never for records.
    """
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(repo, filename, cache_dir=cache_folder(), revision=commit)
    except Exception as error:
        raise_translated(error, repo)
    return Path(found) if isinstance(found, str) and Path(found).is_file() else None


def cached_files(repo: str, filenames: Iterable[str], commit: str) -> list[Path | None]:
    """`cached_file` of each name."""
    return [cached_file(repo, name, commit) for name in filenames]


def hash_in_cache(path: Path) -> str:
    """The Hub's SHA-256 of a file in its client's cache, which is the name of the file's bytes there; "" if unknown."""
    blob = path.resolve()
    return blob.name if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name) else ""


def content_oid(path: Path, *, sha1: bool = False) -> str:
    """The Hub's hash of these bytes: SHA-256, or with `sha1` the git blob's SHA-1."""
    if not sha1:
        return file_sha256(path)
    digest = hashlib.sha1(b"blob %d\x00" % path.stat().st_size)
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def offline() -> Iterator[None]:
    """While the block runs, the Hub's library and all that use it send no request."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
