"""Files opened for reading only if they are regular: no pipe, device or socket is ever waited for."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from lora_cli.errors import DataError

# The places where a process finds what its caller opened for it, such as a shell's `<(…)`.
_HANDED_OVER = ("/dev/fd", "/proc/self/fd")
_KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def open_regular(path: Path | str) -> BufferedReader:
    """A stranger's file, opened for reading. A link is followed to a regular file. OSError for every other kind."""
    # Looked at before it is opened, which alone can set a device to work, and again, as it may be replaced in between.
    _demand_regular(path, os.stat(path))  # noqa: PTH116 - a path may be a text, which is faster for 100,000 files
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _demand_regular(path, os.fstat(descriptor))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def open_given(path: Path) -> BufferedReader:
    """A file that the user names, as `open_regular`, or what the user's shell opened for this process."""
    if str(path) == "/dev/stdin" or str(path.parent) in _HANDED_OVER:
        return path.open("rb")
    return open_regular(path)


def read_given(path: Path) -> bytes:
    """All bytes of a file that the user names. Raises OSError."""
    with open_given(path) as file:
        return file.read()


def read_regular(path: Path | str, most: int = -1) -> bytes:
    """The first `most` bytes of a stranger's file, by default all. Raises OSError."""
    with open_regular(path) as file:
        return file.read(most)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the system's errors while reading a user's file into DataErrors with the file's name."""
    try:
        yield
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> DataError:
    """The error for a user's file that the system could not read."""
    return DataError(f"{path}: cannot be read ({error.strerror})")


def special_kind(path: Path) -> str:
    """ "a pipe", "a device" or "a socket" for a path that leads to one, "" for any other."""
    try:
        return _KINDS.get(stat.S_IFMT(path.stat().st_mode), "")
    except OSError:
        return ""


def _demand_regular(path: Path | str, found: os.stat_result) -> None:
    kind = stat.S_IFMT(found.st_mode)
    if kind == stat.S_IFDIR:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if kind != stat.S_IFREG:
        raise OSError(errno.EINVAL, f"{_KINDS.get(kind, 'a special file')}, not a file", str(path))
