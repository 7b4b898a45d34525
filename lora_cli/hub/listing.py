"""The Hub's listings: one repository of a page as a record."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from lora_cli.names import is_commit
from lora_cli.records import MOST_DATASETS

# The listing takes any subset of properties; the catalogue needs only these.
EXPAND = (
    "author",
    "cardData",
    "config",
    "createdAt",
    "disabled",
    "downloads",
    "gated",
    "lastModified",
    "likes",
    "pipeline_tag",
    "private",
    "sha",
    "siblings",
    "tags",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """One repository as a listing shows it; `base` is declared by its card or config.

    `files` are names only; `files_known` is false if the listing shows none, or more than can be read.
    """

    hub_id: str
    id: str
    author: str
    commit: str
    files: tuple[str, ...]
    files_known: bool = True
    base: str
    licence: str
    datasets: tuple[str, ...]
    card: str
    downloads: int
    likes: int
    gated: str
    disabled: bool
    created_at: str
    modified_at: str


def listed(item: Any) -> Listed | None:
    """A listing's item; any property may be absent or of another type. None without an id and a commit."""
    if not isinstance(item, Mapping):
        return None
    name, commit = _str(item.get("id")), _str(item.get("sha"))
    if not name or not is_commit(commit):
        return None
    card = _mapping(item.get("cardData"))
    peft = _mapping(_mapping(item.get("config")).get("peft"))
    base = card.get("base_model")
    if isinstance(base, list):
        base = base[0] if base else ""
    gated = item.get("gated")
    return Listed(
        hub_id=_str(item.get("_id")) or name,
        id=name,
        author=_str(item.get("author")) or name.partition("/")[0],
        commit=commit,
        files=tuple(filter(None, (_str(_mapping(file).get("rfilename")) for file in _list(item.get("siblings"))))),
        files_known=isinstance(item.get("siblings"), list),
        base=_str(peft.get("base_model_name_or_path")) or _str(base),
        licence=_licence(card, item.get("tags")),
        datasets=tuple(_names(card.get("datasets")))[:MOST_DATASETS],
        card=_card_text(card, item),
        downloads=_int(item.get("downloads")),
        likes=_int(item.get("likes")),
        gated=gated if isinstance(gated, str) else ("yes" if gated else ""),
        disabled=item.get("disabled") is True,
        created_at=_str(item.get("createdAt")),
        modified_at=_str(item.get("lastModified")),
    )


def is_id(name: str) -> bool:
    """Whether the Hub's client asks for a repository of this name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _licence(card: Mapping[str, Any], tags: Any) -> str:
    licences = _names(card.get("license"))
    if licences == ["other"]:
        return _str(card.get("license_name")) or "other"
    if licences:
        return " AND ".join(licences)
    named = [_str(tag) for tag in _list(tags) if _str(tag).startswith("license:")]
    return named[0].removeprefix("license:") if named else ""


def _card_text(card: Mapping[str, Any], item: Mapping[str, Any]) -> str:
    """The listing's text about an adapter, for the full-text search: card metadata and tags, no README."""
    words = []
    for key in ("model_name", "tags", "datasets", "language", "pipeline_tag"):
        value = card.get(key)
        words += [_str(v) for v in value] if isinstance(value, list) else [_str(value)]
    words += [_str(tag) for tag in _list(item.get("tags"))]
    words.append(_str(item.get("pipeline_tag")))
    return " ".join(dict.fromkeys(word for word in words if word))[:20_000]


def _names(value: Any) -> list[str]:
    """A text, or the texts of a list."""
    return list(filter(None, map(_str, value if isinstance(value, list) else [value])))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _str(value: Any) -> str:
    # JSON can hold half a surrogate pair, which neither a database nor a terminal accepts.
    return value[:2_000].encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else ""


def _int(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62 else 0


def with_limit(url: str, size: int) -> str:
    """`url` with a page size of at most `size`."""
    parts = urlsplit(url)
    query = re.sub(r"(^|&)limit=(\d+)", lambda m: f"{m[1]}limit={min(int(m[2]), size)}", parts.query)
    return urlunsplit(parts._replace(query=query))
