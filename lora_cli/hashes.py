"""SHA-256 of files, each read once as long as it stays as it is."""

import hashlib
import os
from functools import lru_cache
from pathlib import Path

Stamp = tuple[int, int, int, int]
"""Device, inode, size and time of change of a file."""


def stamp(status: os.stat_result) -> Stamp:
    """The identity of a file, which changes if the file is written to or replaced."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, as 64 hex digits.

    An unchanged file that this process has hashed already is not read again. Raises OSError where it cannot be read.
    """
    return _hashed(path.absolute(), stamp(path.stat()))


@lru_cache(maxsize=4096)
def _hashed(path: Path, state: Stamp) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
