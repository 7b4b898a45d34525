"""The Hub client's cache: its place, the files in it, and the hashes that name them; its library without a network."""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_cli.files import open_regular, read_regular
from lora_cli.hashes import file_sha256
from lora_cli.hub.problems import raise_translated

_PART = r"[A-Za-z0-9]+([-_.][A-Za-z0-9]+)*"
_ORDINARY = re.compile(rf"(?=.{{1,96}}$){_PART}(/{_PART})?(?<!\.git)(?<!\.ipynb)")
"""Names that a repository may have by all the rules of the Hub; others are left to its library to judge."""


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
    if not _ORDINARY.fullmatch(repo):
        _judge(repo)
    if ".." in commit or commit.startswith("/"):
        return None  # a name of no revision, which comes from strangers
    folder = cache_folder() / f"models--{repo.replace('/', '--')}"
    try:
        ref = folder / "refs" / commit
        found = folder / "snapshots" / (read_regular(ref).decode() if ref.is_file() else commit) / filename
        return found if found.is_file() else None
    except (OSError, ValueError):
        return None


def _judge(repo: str) -> None:
    """Raise this tool's error where the Hub's library refuses a name. Its import takes a third of a second."""
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except Exception as error:
        raise_translated(error, repo)


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


def is_offline() -> bool:
    """Whether the user, or the block that runs, wants no request sent."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


@contextmanager
def offline() -> Iterator[None]:
    """While the block runs, the Hub's library and all that use it send no request."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
