"""What a name means: of a module, an adapter, a repository of the Hub.

Names of base models have a home of their own, formats/base_names.py: an adapter declares its base in any words.
"""

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

_OWNER, _MODEL = r"[A-Za-z0-9][\w.-]{0,95}", r"\w[\w.-]{0,95}"
_FOLDERS = r"[A-Za-z0-9][\w.-]{0,99}(?:/[A-Za-z0-9][\w.-]{0,99})*"
# Without "..": a revision becomes part of a path in the Hub client's cache.
_REVISION = r"(?![\w./-]*\.\.)[A-Za-z0-9][\w./-]{0,199}"
_IS_REPO = re.compile(rf"{_OWNER}/{_MODEL}", re.ASCII)
_IS_MODEL = re.compile(rf"(?:{_OWNER}/)?{_MODEL}", re.ASCII)
_IS_REVISION = re.compile(_REVISION, re.ASCII)
_IS_COMMIT = re.compile(r"[0-9a-f]{40}")
_IS_FOLDER = re.compile(_FOLDERS, re.ASCII)
# Names that Windows cannot give to a folder: those of devices, and any with a point at its end.
_OF_WINDOWS = re.compile(r"(?:con|prn|aux|nul|com\d|lpt\d)(?:\..*)?|.*\.", re.IGNORECASE)
_IN_REPO = re.compile(rf"({_OWNER}/{_MODEL})(?::({_FOLDERS}))?", re.ASCII)
_AT_REVISION = re.compile(rf"@({_REVISION})(?=\Z|:)", re.ASCII)
_AT_COMMIT = re.compile(r"@([0-9a-f]{4,40})(?=\Z|:)")


class Layer(NamedTuple):
    """A module's place in a stack of layers: `mlp.up_proj` in layer `3` of `model.layers`.

    `stack` and `place` are "" where the name begins or ends with the layer's number.
    """

    stack: str
    number: str
    place: str

    @property
    def name(self) -> str:
        """The layer's own name: `model.layers.3`."""
        return f"{self.stack}.{self.number}" if self.stack else self.number


@lru_cache(maxsize=4096)
def layer_of(module: str) -> Layer | None:
    """The layer that holds a module: the first number in its name. None for a name without numbers."""
    parts = module.split(".")
    for at, part in enumerate(parts):
        if part.isascii() and part.isdecimal():
            return Layer(".".join(parts[:at]), part, ".".join(parts[at + 1 :]))
    return None


def layers_of(modules: Iterable[str]) -> set[tuple[str, str]]:
    """Stack and number of every layer that holds one of the modules."""
    return {layer[:2] for layer in map(layer_of, modules) if layer}


def leaf(module: str) -> str:
    """The last part of a module's name, such as "q_proj"."""
    return module.rpartition(".")[2]


def leaves(modules: Iterable[str]) -> set[str]:
    """The last parts of modules' names."""
    return {module.rpartition(".")[2] for module in modules}


def by_leaf(modules: Iterable[str]) -> dict[str, list[str]]:
    """Modules by the last parts of their names."""
    found: dict[str, list[str]] = {}
    for module in modules:
        found.setdefault(module.rpartition(".")[2], []).append(module)
    return found


def parent(module: str) -> str:
    """The name of the module that holds this one, "" for the model itself."""
    return module.rpartition(".")[0]


def is_repo(name: str) -> bool:
    """Whether `name` is `owner/name`, as every repository of the Hub but some old models is called."""
    return _IS_REPO.fullmatch(name) is not None


def is_model(name: str) -> bool:
    """Whether the Hub can have a model of this name: `owner/name`, or a bare name such as gpt2."""
    return _IS_MODEL.fullmatch(name) is not None


def is_commit(text: str) -> bool:
    """Whether `text` is a whole commit: 40 hex digits."""
    return _IS_COMMIT.fullmatch(text) is not None


def is_revision(text: str) -> bool:
    """Whether `text` can be a branch, a tag or a commit."""
    return _IS_REVISION.fullmatch(text) is not None


def is_folder(name: str) -> bool:
    """Whether an adapter can be named by this folder of its repository: every system can have a folder of this name."""
    return bool(_IS_FOLDER.fullmatch(name)) and not any(map(_OF_WINDOWS.fullmatch, name.split("/")))


def in_repo(repo: str, folder: str) -> str:
    """The id of an adapter in a folder of a repository: `owner/name:folder`, `owner/name` for its top."""
    return f"{repo}:{folder}" if folder else repo


def repo_and_folder(id: str) -> tuple[str, str] | None:
    """`owner/name` and the folder, "" for its top, of an adapter on the Hub; None for an id of another form."""
    found = _IN_REPO.fullmatch(id)
    return None if found is None else (found[1], found[2] or "")


def id_and_revision(text: str) -> tuple[str, str]:
    """The id and the revision, "" for none, of a text for the Hub: `owner/name@revision:folder`."""
    found = _AT_REVISION.search(text)
    return (text, "") if found is None else (text[: found.start()] + text[found.end() :], found[1])


def unpinned(pinned: str) -> str:
    """The id in `id@commit`."""
    return pinned.rpartition("@")[0]


def ids_and_commits(text: str) -> list[tuple[str, str]]:
    """The readings of a text for the catalogue, `id@commit`: id and commit, whole or its first digits, "" for none.

    The longest commits come first, the reading without a commit last. The catalogue holds every adapter at one commit
    and no branches, so "@" and a word are part of a folder's name.
    """
    found = [(text[: at.start()] + text[at.end() :], at[1]) for at in _AT_COMMIT.finditer(text)]
    return [*sorted(found, key=lambda one: -len(one[1])), (text, "")]
