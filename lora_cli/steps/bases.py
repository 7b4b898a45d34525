"""The modules of a base model, from its configuration in a folder, in a cache, or by one small request."""

import contextlib
import json
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import platformdirs

from lora_cli.errors import AccessDenied, LoraError, NothingMatched, OutputError, UsageError
from lora_cli.files import read_regular
from lora_cli.formats.base_names import MAIN, split_revision
from lora_cli.hub.cache import cached_file, is_offline
from lora_cli.hub.client import Hub
from lora_cli.names import is_model, is_repo
from lora_cli.outputs import whole_file
from lora_cli.settings import folder_of

if TYPE_CHECKING:
    from lora_cli.formats.skeleton import Skeleton

_CONFIG: Final = "config.json"
_ABSENT: Final = "absent"
_BELIEVED = 86_400.0
_MAX_CONFIG_BYTES = 4_000_000
_PATIENCE = 5.0
_BASES_NAMED = 5


def config_here(base: str) -> Path | None:
    """The folder that holds a base model's configuration on this machine; None where there is none.

    The base is a folder, or on the Hub `owner/name` or `owner/name@revision`.
    """
    folder = folder_of(base)
    if folder is not None:
        return folder if (folder / _CONFIG).is_file() else None
    name, revision = split_revision(base)
    if not is_model(name):
        return None
    file = cached_file(name, _CONFIG, revision or MAIN)
    own = _own_copy(base)
    return file.parent if file is not None else own if (own / _CONFIG).is_file() else None


def skeleton_of(base: str) -> tuple["Skeleton | None", str]:
    """The modules of a base model's class; None if they cannot be found, with a sentence that gives the reason.

    The configuration of a Hub id that is not on this machine is downloaded by one request, and kept.
    """
    folder = config_here(base) or _fetched(base)
    found, why = None, "its config.json is not here"
    if folder is not None:
        found, why = _judged(folder)
    return found, "" if found is not None else f"module names are not checked against {base}: {why}"


def look_here(base: str | None) -> Callable[[], "Skeleton | None"] | None:
    """A function that finds the modules of a base model; None if the configuration is not on this machine."""
    folder = config_here(base) if base else None
    return None if folder is None else partial(skeleton_at, folder)


def skeleton_here(base: str) -> "Skeleton | None":
    """The modules of a base model; None if its configuration is not on this machine or not understood."""
    look = look_here(base)
    return look() if look is not None else None


def skeleton_at(folder: Path) -> "Skeleton | None":
    """The modules of the model in `folder`; None if transformers has no class for its configuration."""
    return _judged(folder)[0]


def _judged(folder: Path) -> tuple["Skeleton | None", str]:
    """The modules of the model in `folder`; None with the reason if its configuration describes no model."""
    why = "transformers has no class for it"
    try:
        config = read_regular(folder / _CONFIG)
        if isinstance(json.loads(config).get("model_type"), str):
            from lora_cli.models.kept_skeleton import kept_skeleton

            return kept_skeleton(folder, config), why
    except LoraError as error:
        why = error.message
    except (OSError, ValueError, RecursionError, AttributeError):
        pass
    return None, why


def _fetched(base: str) -> Path | None:
    """The folder of our own copy of a configuration, downloaded now; a missing file is retried after a day."""
    folder = _own_copy(base)
    name, revision = split_revision(base)
    if not is_repo(name) or is_offline() or _age(folder / _ABSENT) < _BELIEVED:
        return None
    try:
        data = Hub(silence=_PATIENCE, tries=1).read_newest(name, _CONFIG, _MAX_CONFIG_BYTES, revision or MAIN)
        if len(data) > _MAX_CONFIG_BYTES or not isinstance(json.loads(data), dict):
            return None
        _keep(folder, _CONFIG, data)
    except (NothingMatched, AccessDenied):
        with contextlib.suppress(OutputError, OSError):
            _keep(folder, _ABSENT, b"")
        return None
    except (LoraError, OSError, ValueError, RecursionError):
        return None
    return folder


def _keep(folder: Path, name: str, data: bytes) -> None:
    with whole_file(folder / name) as file:
        file.write(data)


def _age(file: Path) -> float:
    """Seconds since a file was written, infinite if there is no file."""
    try:
        return time.time() - file.stat().st_mtime
    except OSError:
        return math.inf


def _own_copy(base: str) -> Path:
    return Path(platformdirs.user_cache_dir("lora", appauthor=False)) / "configs" / base.replace("/", "--")


def demand_one_base(counts: Mapping[str, int]) -> None:
    """UsageError where adapters are for several base models. `counts` has the adapters of each."""
    if len(counts) > 1:
        named = ", ".join(f"{name} ({count:,})" for name, count in [*counts.items()][:_BASES_NAMED])
        more = f" and {len(counts) - _BASES_NAMED:,} more" if len(counts) > _BASES_NAMED else ""
        raise UsageError(
            f"the usable adapters are for {len(counts):,} base models: {named}{more}",
            hint="choose one: --base NAME, LORA_BASE, or base in lora.toml",
        )
