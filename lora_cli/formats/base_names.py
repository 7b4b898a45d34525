"""Names of base models, and which of them name the same model. Reads only the tables of names, never the network.

A base is named `owner/model` or `owner/model@revision` (an id of the Hub; without a revision its main branch), by a
bare name, or by a path. The tables are `lora_cli/data/base_names.toml` and the user's file of the same form.
"""

import hashlib
import re
import tomllib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple

from lora_cli.errors import DataError
from lora_cli.files import read_given
from lora_cli.names import is_commit
from lora_cli.settings import base_names_file, folder_of

MAIN: Final = "main"
_SHIPPED = Path(__file__).parents[1] / "data" / "base_names.toml"
_ENDINGS = ("quantised", "beside")
_LISTS = ("mirrors", "distinct", "folders", *_ENDINGS)
_MOST_ENDINGS = 12
_MAX_NAME = 1_000
_SHORTEST_COMMIT = 7
_NUMBER = r"\d{1,6}(?:\.\d{1,3})?"
_PIECE = re.compile(r"(?=.*[a-z])[a-z0-9#-]{1,40}")
_TOKEN = re.compile(r"[a-z]+|\d+")
_HUB = re.compile(r"https?://(?:huggingface\.co|hf\.co)/")
_CACHED = re.compile(r"models--([^/]+?)--([^/]+)")
_ID = re.compile(rf"(?:{_HUB.pattern})?\w[\w.-]*(?:/[\w.-]+)?", re.ASCII)


class _Name(NamedTuple):
    """A name taken apart: `owner` is "" for a bare name or a path, `revision` "" for the main branch."""

    owner: str
    model: str
    revision: str
    on_hub: bool


@dataclass(frozen=True, slots=True)
class _Tables:
    moved: Mapping[str, str]
    mirrors: frozenset[str]
    distinct: frozenset[tuple[str, tuple[str, ...]]]
    folders: frozenset[str]
    ending: re.Pattern[str]
    digest: str


def canonical_base(name: str) -> str:
    """`name` as base models are compared and shown: an id of the Hub where it is one, of a path the last part.

    Moved ids get their owner (`gpt2` → `openai-community/gpt2`), suffixes of quantised twins go, a path into the
    Hub's cache becomes the id it holds. Two results may still be one base: compare with `same_base`.
    """
    owner, model, revision, _ = _split(name, _tables())
    return at_revision(f"{owner}/{model}" if owner else model, revision)


def public_base(base: str, aliases: Sequence[str] = (), declared: Iterable[str] = ()) -> str:
    """The name of a base model for other people: never a place on this machine.

    An id of the Hub is its own name. The name of a folder is its first alias, else the base that most adapters have
    `declared`, else the last part of its path. Without a base, the adapters' declared bases decide.
    """
    folder = folder_of(base)
    if base and folder is None and not base.startswith(("/", "~", ".")):
        return base
    if base and aliases:
        return aliases[0]
    names = Counter(map(canonical_base, filter(None, declared)))
    if names:
        return min(names, key=lambda name: (-names[name], name))
    return canonical_base(str(folder.resolve()) if folder is not None else base)


def same_base(a: str, b: str, aliases: Collection[str] = ()) -> bool:
    """Whether the names `a` and `b` are one base model, or `a` is one of the `aliases`.

    Case, punctuation, known mirrors (unsloth/…), quantised twins (…-bnb-4bit) and folders on someone's disk make no
    difference; any other part of the name does: neither …-it nor …-abliterated is its base. Revisions are the same
    where they are equal, or one is the beginning of the other, a commit.
    """
    tables = _tables()
    return any(_same(a, other, tables) for other in (b, *aliases))


def is_hub_id(name: str) -> bool:
    """Whether `name` is an id of the Hub with its owner: another id is then another model."""
    return _split(name, _tables()).on_hub


def at_revision(base: str, revision: str) -> str:
    """`base@revision`; `base` alone for the main branch and for a path, which has no revisions."""
    return f"{base}@{revision}" if revision not in ("", MAIN) and _ID.fullmatch(base) else base


def split_revision(base: str) -> tuple[str, str]:
    """The name and the revision of `owner/model@revision`, "" for the main branch; a path has no revisions."""
    name, _, revision = base.partition("@")
    if not revision or not _ID.fullmatch(name):
        return base, ""
    return name, "" if revision == MAIN else revision


def tables_digest() -> str:
    """A stamp of the tables of names. Raises DataError for a user's file that cannot be used."""
    return _tables().digest


def _same(a: str, b: str, tables: _Tables) -> bool:
    if not a or not b:
        return False
    one, other = _split(a, tables), _split(b, tables)
    key = _key(one.model)
    if not key or key != _key(other.model) or not _same_revision(one.revision, other.revision):
        return False
    owners = {one.owner.lower(), other.owner.lower()}
    if len(owners) == 1 or "" in owners:
        return True
    return bool(owners & tables.mirrors) and not any((owner, key) in tables.distinct for owner in owners)


def _same_revision(a: str, b: str) -> bool:
    short, long = sorted((a, b), key=len)
    is_prefix = len(short) >= _SHORTEST_COMMIT and is_commit(long) and long.startswith(short)
    return a == b or is_prefix


def _split(name: str, tables: _Tables) -> _Name:
    path = name[:_MAX_NAME].strip().replace("\\", "/").rstrip("/")
    if cached := _CACHED.search(path):
        return _Name(cached[1], _plain_twin(cached[2], tables), "", True)
    path, revision = split_revision(path)
    parts = _HUB.sub("", path).split("/")
    if len(parts) == 1 and path.lower() in tables.moved:
        parts = tables.moved[path.lower()].split("/")
    local = path.startswith(("/", ".", "~")) or ":" in parts[0] or len(parts) > 2
    if len(parts) == 2 and not local and parts[0].lower() not in tables.folders:
        return _Name(parts[0], _plain_twin(parts[1], tables), revision, True)
    return _Name("", _plain_twin(parts[-1], tables), revision if len(parts) == 1 else "", False)


def _plain_twin(model: str, tables: _Tables) -> str:
    """The model's name without the endings of a quantised copy; `model` itself if it is no such copy."""
    short, quantised = model, False
    for _ in range(_MOST_ENDINGS):
        found = tables.ending.search(short)
        if found is None:
            break
        short, quantised = short[: found.start()], quantised or found["quantised"] is not None
    return short if quantised and short else model


def _key(model: str) -> tuple[str, ...]:
    """Letters and numbers of a model's name: gemma3-270m-it and gemma-3-270m-it are one, 3.1-8b and 3-18b are two."""
    tokens = tuple(_TOKEN.findall(model.lower()))
    # Meta's Llamas were renamed: Meta-Llama-3.1-8B is Llama-3.1-8B.
    return tokens[1:] if tokens[:2] == ("meta", "llama") else tokens


def _tables() -> _Tables:
    """The shipped tables with those of the user's file, which need not exist unless LORA_BASE_NAMES names it."""
    file, origin = base_names_file()
    try:
        text = read_given(file).decode()
    except (FileNotFoundError, NotADirectoryError) as error:
        if origin != "default":
            raise DataError(f"{file}: no such file", hint=f"{origin} names it") from error
        text = ""
    except (OSError, UnicodeError) as error:
        raise DataError(f"{file}: cannot be read ({error})") from error
    return _joined(text, str(file))


@lru_cache(maxsize=4)
def _joined(more: str, where: str) -> _Tables:
    shipped = _SHIPPED.read_text(encoding="utf-8")
    own, users = _parsed(shipped, str(_SHIPPED)), _parsed(more, where)
    lists = {name: [text.lower() for text in own.get(name, []) + users.get(name, [])] for name in _LISTS}
    return _Tables(
        moved={name.lower(): now for name, now in {**own.get("moved", {}), **users.get("moved", {})}.items()},
        mirrors=frozenset(lists["mirrors"]),
        distinct=frozenset((owner, _key(model)) for owner, _, model in (id.partition("/") for id in lists["distinct"])),
        folders=frozenset(lists["folders"]),
        ending=_ending(lists["quantised"], lists["beside"]),
        digest=hashlib.sha256(f"{shipped}\0{more}".encode()).hexdigest(),
    )


def _parsed(text: str, where: str) -> dict[str, Any]:
    """The tables in a file of names. DataError names its fault."""
    try:
        found = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not TOML ({error})") from error
    for name, value in found.items():
        if name not in (*_LISTS, "moved"):
            raise DataError(f"{where}: unknown table {name!r}", hint=f"there are {', '.join((*_LISTS, 'moved'))}")
        if wrong := _wrong(name, value):
            raise DataError(f"{where}: {wrong}")
    return found


def _wrong(name: str, value: Any) -> str:
    """The fault of a table, "" for none."""
    kind = dict if name == "moved" else list
    texts = [*value, *value.values()] if isinstance(value, dict) else value
    if not isinstance(value, kind) or not all(isinstance(one, str) and one for one in texts):
        return f"{name} is not a {'table' if name == 'moved' else 'list'} of names"
    if name in _ENDINGS and (odd := [one for one in texts if not _PIECE.fullmatch(one.lower())]):
        return f"{name} holds {odd[0]!r}: an ending is letters and digits, # for a number, - for any of - _ ."
    return ""


def _ending(quantised: Sequence[str], beside: Sequence[str]) -> re.Pattern[str]:
    """Matches the longest ending of a name; the group "quantised" is None for an ending that counts only in a chain."""
    one, other = ("|".join(map(_piece, pieces)) for pieces in (quantised, beside))
    return re.compile(rf"[-_.](?:(?P<quantised>{one})|(?:{other}))\Z", re.ASCII | re.IGNORECASE)


def _piece(text: str) -> str:
    return re.escape(text).replace(r"\-", "[-_.]").replace(r"\#", _NUMBER)
