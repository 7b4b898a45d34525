"""Outputs that are complete or absent: written beside their place, renamed into it last.

Unfinished work stands as `.NAME.TOKEN.partial` beside its place, a folder or file that its process holds locked. The
next process with the same output removes what no process holds.
"""

import errno
import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from lora_cli.errors import OutputError
from lora_cli.files import read_regular, special_kind, unreadable

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def whole_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` if the block succeeds, and is removed if it fails.

    Remains of killed processes for the same target are removed first. If `target` exists, it is complete.

    Raises:
        OutputError: `target` exists and `replace` is false (even if it was made during the work), is a link, a pipe,
            a device or a socket, or its place cannot be written.
    """
    _refuse_special(target)
    target = target.absolute()
    partial = _beside(target)
    held = None
    # A signal may end the work at any line, so everything that makes a file stands inside this block.
    try:
        with _place_of_a_full_disk(target):
            with _explained(target.parent):
                target.parent.mkdir(parents=True, exist_ok=True)
                _sweep(target)
                if target.exists() and not replace:
                    raise OutputError(
                        f"{target} exists", hint="choose another folder with -o, or replace it with --force"
                    )
                held = _made_and_locked(partial)
            yield partial
            with _explained(target):
                for file in sorted(partial.rglob("*")):
                    _sync(file)
                _sync(partial)
                _put(partial, target, replace=replace)
                _sync(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if held is not None:
            os.close(held)


@contextmanager
def whole_file(target: Path) -> Iterator[BinaryIO]:
    """Yield a new binary file that replaces `target` if the block succeeds, and is removed if it fails.

    Raises OutputError where `target` is a link, a pipe, a device or a socket, or its place cannot be written.
    """
    _refuse_special(target)
    target = target.absolute()
    partial = _beside(target)
    try:
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            _sweep(target)
            # Mode x neither follows a link nor takes a file of another process.
            with partial.open("xb") as file:
                hold(file.fileno(), without_locks=True)
                yield file
                file.flush()
                os.fsync(file.fileno())
                _refuse_special(target)
                partial.replace(target)
            _sync(target.parent)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """OutputError for an OSError while `place` is written, a full disk included."""
    with _place_of_a_full_disk(place), _explained(place):
        yield


@contextmanager
def _explained(place: Path) -> Iterator[None]:
    """OutputError for an OSError, except for those of `_place_of_a_full_disk`."""
    try:
        yield
    except OSError as error:
        if error.errno in (*_FULL, errno.EFBIG):
            raise
        # Python 3.11's rmtree closes a descriptor twice if a signal comes in between: the signal is what counts.
        if error.errno == errno.EBADF and isinstance(error.__context__, KeyboardInterrupt | SystemExit):
            raise error.__context__ from None
        raise OutputError(f"{place}: cannot be written ({error.strerror})") from error


@contextmanager
def _place_of_a_full_disk(target: Path) -> Iterator[None]:
    """OutputError with its place for a full disk, or a file above its limit of size; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise OutputError(
                f"{error.filename or target}: larger than this disk, or ulimit -f, allows a file to be",
                hint="choose a place on another disk",
            ) from error
        if error.errno not in _FULL:
            raise
        place = error.filename or target
        raise OutputError(f"{place}: no space left on the disk", hint="free some space, then run this again") from error


def demand_own(target: Path, beginnings: tuple[bytes, ...], what: str) -> None:
    """OutputError for a file with text that begins as none of the tool's: a user's file, and not one to replace.

    Args:
        beginnings: the first bytes of such a file, one of which it has to have.
        what: such a file, in words.
    """
    if not target.is_file():
        return  # a new file, or a place that `whole_file` refuses
    try:
        head = read_regular(target, max(map(len, beginnings)))
    except OSError as error:
        raise unreadable(target, error) from error
    if head and not head.startswith(beginnings):
        raise OutputError(f"{target} exists and is no {what}", hint="choose another file with -o, or move it away")


def demand_apart(target: Path, inputs: Iterable[tuple[str, Path]]) -> None:
    """OutputError for an output that equals, contains or lies in the folder of an input; each has a name for people."""
    out = target.resolve()
    for what, folder in inputs:
        place = folder.resolve()
        if out.is_relative_to(place) or place.is_relative_to(out):
            raise OutputError(f"{target}: that is where the {what} is", hint="choose another folder with -o")


def _beside(target: Path) -> Path:
    return target.parent / f".{target.name}.{secrets.token_hex(4)}.partial"


def _refuse_special(target: Path) -> None:
    """OutputError for a link, and for a pipe, a device or a socket, whose place an output would take."""
    if target.is_symlink():
        raise OutputError(f"{target}: a link; outputs are never written through links")
    if kind := special_kind(target):
        raise OutputError(f"{target}: {kind}, which no output replaces", hint="choose another place with -o")


def _put(partial: Path, target: Path, *, replace: bool) -> None:
    """Rename the finished folder into place. A folder made there meanwhile is replaced only on request."""
    _refuse_special(target)
    if not replace:
        try:
            # Fails if there is a file or a non-empty folder.
            partial.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise OutputError(
                f"{target} was made by another process meanwhile", hint="choose another folder with -o, or run again"
            ) from error
        return
    old = partial.with_suffix(".old")
    held = None
    if target.exists():
        # Locked, it is no remains of a killed process, for the moment in which nothing stands at the target.
        held = os.open(target, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        hold(held, without_locks=True)
        target.rename(old)
    try:
        partial.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    finally:
        if held is not None:
            os.close(held)
    if old.is_dir() and not old.is_symlink():
        shutil.rmtree(old)
    else:
        old.unlink(missing_ok=True)


def _sweep(target: Path) -> None:
    """Remove remains of dead processes for `target`; restore an output whose replacement was interrupted."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]+\.(partial|old)")
    for entry in target.parent.iterdir():
        match = pattern.fullmatch(entry.name)
        if match is None or entry.is_symlink() or not (entry.is_dir() or entry.is_file()):
            continue
        try:
            descriptor = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            continue
        try:
            if not hold(descriptor, without_locks=False):
                continue
            if match[1] == "old" and not target.exists():
                entry.rename(target)
            elif entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def _made_and_locked(folder: Path) -> int:
    """The open descriptor of a new folder that this process holds. A sweep may remove it before it is locked."""
    while True:
        folder.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            if hold(descriptor, without_locks=True) and folder.exists():
                return descriptor
            os.close(descriptor)
        time.sleep(0.01)


def hold(descriptor: int, *, without_locks: bool) -> bool:
    """Lock an open file or folder until it is closed; False if another process holds it.

    without_locks: the answer on a disk that has no locks. There work goes on unlocked, and a sweep removes nothing.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return without_locks
    return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
