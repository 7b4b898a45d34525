"""Files that stay as they are: their identity, and their SHA-256, for which each is read once, or not at all."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import BufferedReader, FileIO
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
        _keep(*key, found)
    return found


def _keep(path: Path, of: Stamp, sha256: str) -> None:
    with _adding:
        _known[path, of] = sha256
        while len(_known) > _MOST_KNOWN:
            _known.pop(next(iter(_known)), None)


@contextmanager
def hashed_as_written(path: Path) -> Iterator["HashedFile"]:
    """A new file, or an old one anew, whose SHA-256 is at hand for `sha256_of` when the block has ended."""
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as other:
        hashed = HashedFile(file, other)
        yield hashed
        sha256 = hashed.finished()
        _keep(path.absolute(), stamp(os.fstat(file.fileno())), sha256)


class HashedFile:
    """A file that is written from its start to its end, while another thread hashes the same bytes."""

    def __init__(self, file: FileIO, other: ThreadPoolExecutor) -> None:
        self._file, self._other = file, other
        self._digest = hashlib.sha256()
        self._hashing: Future[None] | None = None

    def write(self, data: memoryview) -> None:
        """Write bytes behind those before, all of them. The caller leaves them as they are."""
        self._wait()
        self._hashing = self._other.submit(self._digest.update, data)
        while data:
            data = data[self._file.write(data) :]

    def finished(self) -> str:
        """The SHA-256 of all that was written, as 64 hex digits."""
        self._wait()
        return self._digest.hexdigest()

    def _wait(self) -> None:
        if self._hashing is not None:
            self._hashing.result()


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
