"""SHA-256 of files, each read once as long as it stays as it is."""

import hashlib
import os
from pathlib import Path

from lora_cli.files import open_regular
from lora_cli.records import Progress, silent

Stamp = tuple[int, int, int, int]
"""Device, inode, size and time of change of a file."""
_BLOCK = 1 << 24
_MOST_KNOWN = 4096
_known: dict[tuple[Path, Stamp], str] = {}


def stamp(status: os.stat_result) -> Stamp:
    """The identity of a file, which changes if the file is written to or replaced."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def file_sha256(path: Path, progress: Progress = silent) -> str:
    """The SHA-256 of a file's bytes, as 64 hex digits.

    An unchanged file that this process has hashed already is not read again. Raises OSError where it cannot be read.
    """
    key = path.absolute(), stamp(path.stat())
    found = _known.get(key)
    if found is None:
        found = _known[key] = _hashed(path, progress)
        while len(_known) > _MOST_KNOWN:
            _known.pop(next(iter(_known)), None)
    return found


def _hashed(path: Path, progress: Progress) -> str:
    digest, done = hashlib.sha256(), 0
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        block = memoryview(bytearray(min(size, _BLOCK) + 1))
        while count := file.readinto(block):
            digest.update(block[:count])
            done += count
            if size > _BLOCK:
                progress(f"hashing {path.name}, MB", done // 1_000_000, size // 1_000_000)
    return digest.hexdigest()
