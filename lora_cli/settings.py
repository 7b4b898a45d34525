"""Settings, by precedence: flag > LORA_* environment > ./lora.toml > user configuration > default."""

import difflib
import os
import tomllib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import platformdirs

from lora_cli.errors import UsageError
from lora_cli.files import read_given
from lora_cli.licences import POLICIES, Policy
from lora_cli.precision import LOADED, Loading
from lora_cli.text import nearest

PROJECT_FILE = "lora.toml"
BASE_NAMES = "LORA_BASE_NAMES"
# Limits of the search for folders of a like name.
_DEEPEST, _MOST_ENTRIES = 32, 5_000
_OF_ONE_BASE = ("base_aliases", "pool")
_Layer = tuple[str, Mapping[str, Any], Path]


@dataclass(frozen=True, slots=True)
class Key:
    """One setting: the parser of its value, its default and a line of help."""

    parse: Callable[[Any, Path], Any]
    default: Callable[[], Any]
    help: str


@dataclass(frozen=True, slots=True)
class Setting:
    """A value and its origin."""

    value: Any
    origin: str


def folder_of(text: str) -> Path | None:
    """The existing folder `text` points to (~ expanded), or None. Never raises."""
    # os.path.expanduser and isdir never raise, unlike pathlib, even for over-long or unreadable paths.
    path = os.path.expanduser(text)  # noqa: PTH111
    return Path(path) if os.path.isdir(path) else None  # noqa: PTH112


def means_folder(text: str) -> bool:
    """Whether `text`, if it names no existing folder, is a mistyped one and no id of the Hub.

    It begins or ends like a path, has more parts than an id, or its first part is a folder here; a name with a
    revision is an id.
    """
    name = text.partition(":")[0]
    if text.startswith((".", "/", "~")) or text.endswith("/") or name.count("/") > 1:
        return True
    return "/" in name and "@" not in name and folder_of(name.partition("/")[0]) is not None


def folders_like(text: str) -> list[str]:
    """Existing folders whose names are like that of a missing one, the likeliest first. Never raises."""
    path = Path(os.path.expanduser(text))  # noqa: PTH111 - see folder_of
    return [str(folder) for folder in _like(path)] if len(path.parts) <= _DEEPEST and "\0" not in text else []


def _like(path: Path) -> list[Path]:
    if folder_of(str(path)) is not None:
        return [path]
    found: list[Path] = []
    for parent in [] if path == path.parent else _like(path.parent):
        names: list[str] = []
        with suppress(OSError), os.scandir(parent) as entries:
            names = sorted(entry.name for entry in islice(entries, _MOST_ENTRIES) if entry.is_dir())
        found += [parent / name for name in difflib.get_close_matches(path.name, names, n=3)]
    return found[:3]


def _text(value: Any, folder: Path) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("a text")
    return value


def _base(value: Any, folder: Path) -> str:
    """A Hub id unchanged; the name of an existing folder beside the file as its path."""
    text = _text(value, folder)
    local = folder_of(str(folder / _at_home(text)))
    # Drop @main: a name without a revision means the main branch, so that one base has one name.
    return str(local.resolve()) if local is not None else text.removesuffix("@main")


def _path(value: Any, folder: Path) -> Path:
    text = _text(value, folder)
    if "\0" in text:
        raise ValueError("a path")
    return (folder / _at_home(text)).absolute()


def _at_home(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError("a path") from None


def _texts(value: Any, folder: Path) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise ValueError("a list of texts")
    return tuple(value)


def _seed(value: Any, folder: Path) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError("a whole number from 0")
    text = str(value)
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else -1
    if number < 0:
        raise ValueError("a whole number from 0")
    return number


def _one_of(*words: str) -> Callable[[Any, Path], str]:
    def parse(value: Any, folder: Path) -> str:
        if value not in words:
            raise ValueError(f"one of {', '.join(words)}")
        return str(value)

    return parse


def _device(value: Any, folder: Path) -> str:
    text = _text(value, folder)
    if text.split(":")[0] not in ("auto", "cpu", "cuda", "mps"):
        raise ValueError("auto, cpu, cuda, cuda:N or mps")
    return text


def _data_folder() -> Path:
    return Path(platformdirs.user_data_dir("lora", appauthor=False))


KEYS: dict[str, Key] = {
    "base": Key(_base, lambda: None, "base model: a Hub id or a local folder"),
    "base_aliases": Key(_texts, tuple, "other names under which adapters declare the same base"),
    "pool": Key(_path, lambda: None, "folder tree that `pool sync` reads instead of the Hub"),
    "db": Key(_path, lambda: _data_folder() / "catalogue.db", "the catalogue, one SQLite file"),
    "data": Key(_path, lambda: None, "task file for fit and train"),
    "test": Key(_path, lambda: None, "task file for eval"),
    "device": Key(_device, lambda: "auto", "auto, cpu, cuda, cuda:N or mps"),
    "dtype": Key(_one_of(*LOADED), lambda: "auto", f"precision of the base model: {', '.join(LOADED)}"),
    "runs": Key(_path, lambda: Path.cwd() / "lora-runs", "folder that collects the outputs of merge, fit and train"),
    "license_policy": Key(_one_of(*POLICIES), lambda: "warn", f"what restricted licences do: {', '.join(POLICIES)}"),
    "seed": Key(_seed, lambda: 0, "seed of everything random"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Every setting, see `KEYS`, and by name the origin of each value."""

    base: str | None
    base_aliases: tuple[str, ...]
    pool: Path | None
    db: Path
    data: Path | None
    test: Path | None
    device: str
    dtype: Loading
    runs: Path
    license_policy: Policy
    seed: int
    origins: Mapping[str, str]

    def with_values(self, **values: Any) -> "Settings":
        """These settings with some values replaced."""
        return replace(self, **values, origins={**self.origins, **dict.fromkeys(values, "argument")})

    def origin(self, name: str) -> str:
        """The origin of the value of `name`."""
        return self.origins[name]


def user_file() -> Path:
    """The user's own configuration file, which need not exist."""
    return Path(platformdirs.user_config_dir("lora", appauthor=False)) / "config.toml"


def base_names_file() -> tuple[Path, str]:
    """The user's own table of base-model names, and its origin: LORA_BASE_NAMES, or "default" for beside `user_file`.

    Only a file named by LORA_BASE_NAMES must exist. Raises UsageError for a value that is not a path.
    """
    if not (named := os.environ.get(BASE_NAMES)):
        return user_file().with_name("base_names.toml"), "default"
    try:
        return _path(named, Path.cwd()), BASE_NAMES
    except ValueError:
        raise UsageError(f"{BASE_NAMES} must be a path, not {named!r}") from None


def load(flags: Mapping[str, Any] | None = None) -> Settings:
    """Read all settings; `flags` holds the values from the command line (None for missing ones).

    `base_aliases` and `pool` belong to the base of their own layer or of a lower one: if a higher layer sets another
    base, they are ignored.

    Raises:
        UsageError: a file that is not TOML, an unknown key, or a value of the wrong kind.
    """
    here = Path.cwd()
    layers: list[_Layer] = [
        ("flag", {k: v for k, v in (flags or {}).items() if v is not None}, here),
        ("environment", {k: os.environ[n] for k in KEYS if os.environ.get(n := f"LORA_{k.upper()}")}, here),
    ]
    for file in (here / PROJECT_FILE, user_file()):
        layers.append((PROJECT_FILE if file.parent == here else str(file), _read(file), file.parent))
    found = {name: _first(name, layers) for name in KEYS}
    for name in _OF_ONE_BASE:
        place = next((place for place, (_, values, _) in enumerate(layers) if name in values), 0)
        if _first("base", layers[place:]).value not in (None, found["base"].value):
            origin = f"default: that of {found[name].origin} is for another base"
            found[name] = Setting(KEYS[name].default(), origin)
    return Settings(
        **{name: setting.value for name, setting in found.items()},
        origins={name: setting.origin for name, setting in found.items()},
    )


def _first(name: str, layers: Sequence[_Layer]) -> Setting:
    """The value in the highest of `layers` that has one."""
    for origin, values, folder in layers:
        if name in values:
            label = f"LORA_{name.upper()}" if origin == "environment" else origin
            return Setting(_parsed(name, KEYS[name], values[name], folder, label), label)
    return Setting(KEYS[name].default(), "default")


def _parsed(name: str, key: Key, value: Any, folder: Path, label: str) -> Any:
    value = str(value) if isinstance(value, Path) else value
    try:
        return key.parse(value, folder)
    except ValueError as error:
        said = f"--{name}" if label == "flag" else f"{label}: {name}"
        raise UsageError(f"{said} must be {error}, not {value!r}") from None


def _read(file: Path) -> Mapping[str, Any]:
    try:
        values = tomllib.loads(read_given(file).decode())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{file.name} cannot be read: {reason}") from None
    for name in values:
        if name not in KEYS:
            hint = nearest(name, KEYS, f"settings are {', '.join(KEYS)}")
            raise UsageError(f"{file.name}: unknown setting {name!r}", hint=hint)
    return values


def base_of(settings: Settings) -> str:
    """The base model to load. UsageError if neither option nor setting names one."""
    if settings.base is None:
        raise UsageError("no base model", hint="give --base, set LORA_BASE, or set base in lora.toml")
    return str(settings.base)
