"""Output folders that are complete or absent: written beside their place, renamed into it last."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_cli.errors import OutputError


@contextmanager
def whole_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` if the block succeeds, and is removed if it fails.

    Remains of a killed process for the same target are removed first. If `target` exists, it is complete.

    Raises:
        OutputError: `target` exists and `replace` is false (even if it was made during the work), is a link, or
            its place cannot be written.
    """
    _refuse_link(target)
    target = target.absolute()
    partial = target.parent / f".{target.name}.{os.getpid()}.partial"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        if target.exists() and not replace:
            raise OutputError(f"{target} exists", hint="choose another folder with -o, or replace it with --force")
        partial.mkdir()
    except OSError as error:
        raise OutputError(f"{target.parent}: cannot be written ({error.strerror})") from error
    try:
        yield partial
        try:
            for file in sorted(partial.rglob("*")):
                _sync(file)
            _sync(partial)
            _put(partial, target, replace=replace)
            _sync(target.parent)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise OutputError(f"{target}: cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _refuse_link(target: Path) -> None:
    if target.is_symlink():
        raise OutputError(f"{target}: a link; outputs are never written through links")


def _put(partial: Path, target: Path, *, replace: bool) -> None:
    """Rename the finished folder into place. A folder made there meanwhile is replaced only on request."""
    _refuse_link(target)
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
    if target.exists():
        target.rename(old)
    try:
        partial.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    if old.is_dir() and not old.is_symlink():
        shutil.rmtree(old)
    else:
        old.unlink(missing_ok=True)


def _sweep(target: Path) -> None:
    """Remove remains of dead processes for `target`; restore an output whose replacement was interrupted."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.(\d+)\.(partial|old)")
    for entry in target.parent.iterdir():
        match = pattern.fullmatch(entry.name)
        if not match or _alive(int(match[1])):
            continue
        if match[2] == "old" and not target.exists():
            entry.rename(target)
        else:
            shutil.rmtree(entry, ignore_errors=True)


def _alive(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
