"""Skeletons kept in the user's cache: to build one takes seconds, nearly all of it imports of transformers and PEFT."""

import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

import platformdirs

from lora_cli.errors import OutputError
from lora_cli.files import read_regular
from lora_cli.formats.skeleton import Matrix, Skeleton, Stack
from lora_cli.outputs import whole_file

_FORM: Final = 1
"""Raised whenever one configuration gives another skeleton by the same versions."""
_BY: Final = ("lora-cli", "transformers", "peft")
_DAMAGED: Final = (OSError, ValueError, LookupError, TypeError, AttributeError)
_ASKED: Final = ("renamed", "stored")
"""The fields that are functions of the class: they build it."""


def kept_skeleton(folder: Path, config: bytes) -> Skeleton | None:
    """`skeleton` of the folder, built once for a configuration and the versions of lora, transformers and PEFT.

    Args:
        config: what the folder's config.json holds.

    Raises:
        Refused, DataError: as `skeleton`.
    """
    place = _place_of(config)
    with suppress(*_DAMAGED):
        return _read(place, folder)
    found = _built(folder)
    if found is not None:
        with suppress(OSError, OutputError), whole_file(place) as file:
            file.write(json.dumps(_values(found)).encode())
    return found


def _place_of(config: bytes) -> Path:
    by = [_FORM, *(importlib.metadata.version(package) for package in _BY), hashlib.sha256(config).hexdigest()]
    name = hashlib.sha256(json.dumps(by).encode()).hexdigest()[:40]
    return Path(platformdirs.user_cache_dir("lora", appauthor=False)) / "skeletons" / f"{name}.json"


def _built(folder: Path) -> Skeleton | None:
    from lora_cli.models.skeleton import skeleton

    return skeleton(folder)


def _values(found: Skeleton) -> dict[str, Any]:
    values = {one.name: getattr(found, one.name) for one in fields(Skeleton) if one.name not in _ASKED}
    stacks = {name: [one.experts, one.shape, one.transposed, one.parts] for name, one in found.stacks.items()}
    sets = {name: sorted(value) for name, value in values.items() if isinstance(value, frozenset)}
    return values | sets | {"stacks": stacks}


@functools.lru_cache(maxsize=8)
def _read(place: Path, folder: Path) -> Skeleton:
    """The skeleton in a file. One of `_DAMAGED` for one that is damaged or absent."""
    values: dict[str, Any] = json.loads(read_regular(place))
    matrices: Mapping[str, list[Any]] = values["matrices"]
    values["matrices"] = {
        name: Matrix(kind, tuple(shape), parameter, tuple(stored), *rest)
        for name, (kind, shape, parameter, stored, *rest) in matrices.items()
    }
    values["stacks"] = {
        name: Stack(experts, tuple(shape), transposed, tuple(parts))
        for name, (experts, shape, transposed, parts) in values["stacks"].items()
    }
    values["ties"] = {name: tuple(others) for name, others in values["ties"].items()}
    values |= {name: frozenset(values[name]) for name in ("others", "attentions", "retargeted")}

    def ask(name: str, *about: Any) -> Any:
        built = _built(folder)
        assert built is not None
        return getattr(built, name)(*about)

    return Skeleton(**values, renamed=functools.partial(ask, "renamed"), stored=functools.partial(ask, "stored"))
