"""Foreign adapters as PEFT folders in the cache of the user, under a hash of what they were made from."""

import hashlib
import json
from pathlib import Path
from typing import Final

import platformdirs

from lora_cli.formats.kinds import CONFIG_NAME, WEIGHTS_NAME
from lora_cli.hashes import sha256_of
from lora_cli.imports import Found
from lora_cli.outputs import whole_folder

_FORM: Final = 1
"""Raised whenever the same files would be written in another way."""


def commit_of(found: Found) -> str:
    """A hash of 40 hex digits over the files that decide a foreign adapter. DataError where one cannot be read."""
    hashes = [(file.name, sha256_of(file)) for file in found.files]
    return hashlib.sha256(json.dumps([found.by.program, hashes]).encode()).hexdigest()[:40]


def place_of(commit: str) -> Path:
    """The folder for the adapter of this commit; it exists if it was made."""
    return Path(platformdirs.user_cache_dir("lora", appauthor=False)) / "converted" / f"{_FORM}-{commit}"


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
