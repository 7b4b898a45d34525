"""Files that stay as they are: their identity, and their SHA-256, for which each is read once."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from threading import Lock

from lora_cli.errors import Refused
from lora_cli.files import open_regular, unreadable
from lora_cli.records import Progress, silent

Stamp = tuple[int, int, int, int]
"""Device, inode, size and time of change of a file."""
_BLOCK = 1 << 24
_AT_ONCE = 8
_MOST_KNOWN = 4096
_known: dict[tuple[Path, Stamp], str] = {}
_adding = Lock()


def stamp(status: os.stat_result) -> Stamp:
    """The identity of a file, which changes if the file is written to or replaced."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def stamp_of(path: Path) -> Stamp:
    """The stamp of the file at `path`. DataError where it cannot be read."""
    try:
        return stamp(path.stat())
    except OSError as error:
        raise unreadable(path, error) from error


@contextmanager
def opened_as(path: Path, before: Stamp, whose: str) -> Iterator[BufferedReader]:
    """A file open for reading, which still has the stamp `before`; `whose` it is begins the message if it has not.

    Raises:
        Refused: another file, or one that was written to. DataError: it cannot be read.
    """
    try:
        with open_regular(path) as file:
            if stamp(os.fstat(file.fileno())) != before:
                raise Refused(f"{whose} changed while they were used", hint="run this again")
            yield file
    except OSError as error:
        raise unreadable(path, error) from error


def sha256_of(path: Path, progress: Progress = silent) -> str:
    """As `file_sha256`, but DataError where the file cannot be read."""
    try:
        return file_sha256(path, progress)
    except OSError as error:
        raise unreadable(path, error) from error


def sha256_of_all(paths: Iterable[Path], progress: Progress = silent) -> list[str]:
    """`sha256_of` each file."""
    return [sha256_of(path, progress) for path in paths]


def hash_ahead(paths: Iterable[Path], progress: Progress = silent) -> None:
    """Hash some files at once, so that `sha256_of` has their hashes at hand. What cannot be read is left to it."""
    files = [*paths]
    with ThreadPoolExecutor(min(_AT_ONCE, os.cpu_count() or 1)) as pool:
        for done, _ in enumerate(pool.map(_tried, files), 1):
            progress("hashing adapters", done, len(files))


def _tried(path: Path) -> None:
    with suppress(OSError):
        file_sha256(path)


def file_sha256(path: Path, progress: Progress = silent) -> str:
    """The SHA-256 of a file's bytes, as 64 hex digits.

    An unchanged file that this process has hashed already is not read again. Raises OSError where it cannot be read.
    """
    key = path.absolute(), stamp(path.stat())
    found = _known.get(key)
    if found is None:
        found = _hashed(path, progress)
        with _adding:
            _known[key] = found
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
