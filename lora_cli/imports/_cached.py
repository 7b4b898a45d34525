"""Foreign adapters as PEFT folders in the cache of the user, under a hash of what they were made from."""

import hashlib
import json
import re
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Final

import platformdirs

from lora_cli.formats.kinds import CONFIG_NAME, WEIGHTS_NAME
from lora_cli.hashes import sha256_of
from lora_cli.hub.holdings import Held
from lora_cli.imports import Found
from lora_cli.outputs import whole_folder

_FORM: Final = 2
"""Raised whenever the same files would be written in another way."""


_HELD: Final = re.compile(r"(\d+)-([0-9a-f]{40})|\..+\.(?:partial|old)")


def commit_of(found: Found) -> str:
    """A hash of 40 hex digits over the files that decide a foreign adapter. DataError where one cannot be read."""
    hashes = [(file.name, sha256_of(file)) for file in found.files]
    return hashlib.sha256(json.dumps([found.by.program, hashes]).encode()).hexdigest()[:40]


def place_of(commit: str) -> Path:
    """The folder for the adapter of this commit; it exists if it was made."""
    return _cache() / f"{_FORM}-{commit}"


def held() -> list[Held]:
    """The folders in the cache, by name: `repo` and `commit` are "" for the remains of a conversion that was cut short.

    Those in an older form have their reason to go.
    """
    found = []
    with suppress(OSError):
        for folder in sorted(_cache().iterdir()):
            name = _HELD.fullmatch(folder.name)
            if name is None or folder.is_symlink() or not folder.is_dir():
                continue
            facts = [file.stat() for file in folder.iterdir()]
            used = max((max(one.st_atime, one.st_mtime) for one in facts), default=folder.stat().st_mtime)
            older = name[1] is not None and int(name[1]) != _FORM
            found.append(
                Held(
                    repo="",
                    commit=name[2] or "",
                    bytes=sum(one.st_size for one in facts),
                    used=used,
                    path=folder,
                    reason="older form" if older else "",
                )
            )
    return found


def forget(chosen: Collection[Held]) -> int:
    """Delete these folders of the cache, and return the bytes freed. They are made again where they are needed."""
    freed = 0
    for one in chosen:
        with suppress(OSError):
            shutil.rmtree(one.path)
            freed += one.bytes
    return freed


def _cache() -> Path:
    return Path(platformdirs.user_cache_dir("lora", appauthor=False)) / "converted"


def converted(found: Found) -> Path:
    """The folder of PEFT files, made now if it is not there.

    Raises:
        Refused: an update that PEFT cannot represent, with the kind in front. DataError: an unreadable file.
        OutputError: the cache cannot be written.
    """
    folder = place_of(commit_of(found))
    if all((folder / name).is_file() for name in (CONFIG_NAME, WEIGHTS_NAME)):
        return folder
    foreign = found.open()

    from lora_cli.imports._written import Conversion, write

    conversion = Conversion(foreign=foreign)
    with found.named():
        conversion.demand_low_rank()
        with whole_folder(folder, replace=True) as partial:
            write(conversion, partial)
    return folder
