"""From the user's text to one adapter: the catalogue's row, else a repository of the Hub, read as a sync reads it."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from lora_cli.catalogue.adapters import Catalogue
from lora_cli.catalogue.rows import Known
from lora_cli.checks.examine import UNDECLARED
from lora_cli.checks.rules import Rules
from lora_cli.errors import AccessDenied, NetworkError, NothingMatched, Refused
from lora_cli.formats.factors import TAKE_THE_UPDATE, only_saved_whole
from lora_cli.formats.store import locate
from lora_cli.hub.client import Hub
from lora_cli.names import id_and_revision, is_commit, repo_and_folder
from lora_cli.records import USABLE, Adapter, Progress, silent
from lora_cli.settings import folders_like, means_folder
from lora_cli.sources import Found
from lora_cli.sources.hub import HubReader
from lora_cli.steps.bases import skeleton_here
from lora_cli.steps.pool.verify import verify
from lora_cli.text import meant

NAME_THE_BASE = "name its base model: --base NAME"


def look_up(
    catalogue: Catalogue,
    text: str,
    *,
    base: str = "",
    aliases: Sequence[str] = (),
    whole: bool = False,
    announce: Callable[[str], None],
    progress: Progress = silent,
    store: bool = True,
) -> Adapter:
    """The row for `text`. For a Hub id that is not in the catalogue, the Hub is asked for that repository alone.

    An adapter from the Hub is pinned to its commit and, if it is usable, stored; only then is a row at another commit
    replaced. Nothing is sent for a name in the catalogue, for an older commit whose files are in the cache (its row is
    left as it is), or for text that cannot be a Hub id or is a mistyped folder.

    Args:
        text: a catalogue id, a folder, or `owner/name[@revision][:subfolder]` with a branch, tag or commit.
        base: the base model that an adapter from the Hub must be for, "" for any. An adapter without a declared base
            counts as one for `base`, unless its shapes are known not to fit.
        aliases: other names of that base, beside those that the catalogue remembers.
        whole: also accept an adapter that holds modules saved whole beside its update.
        announce: called with a line about an adapter from the Hub, or about one older than its row.
        store: whether an adapter from the Hub may be stored.

    Raises:
        NothingMatched: the adapter is neither in the catalogue nor on the Hub.
        AccessDenied, Refused: found on the Hub, but gated, unusable, or for another base.
        NetworkError: not in the catalogue, and the Hub cannot be asked.
    """
    try:
        row = catalogue.named(text, base=base or None)
    except NothingMatched as error:
        name = _read(catalogue, text)
        unknown = _unknown(name, error)
    else:
        if not base or not names_no_base(row):
            return row
        if row.source == "folder":
            return replace(row, status="ok", reason="", base=base)
        name, unknown = _read(catalogue, text), NothingMatched(f"{row.id}: {row.reason}")
    names = names_of(catalogue, base, aliases)
    if (older := _older(catalogue, name)) is not None:
        row = usable(verify(older, base=base, aliases=names, deep=True).adapter, whole=whole)
        announce(f"{row.id}: using the cached files of commit {row.commit[:12]}; the catalogue is at another commit")
        return row
    rules = Rules(base, names, partial(skeleton_here, base), with_skeleton=False, vouched=bool(base))
    found = _on_hub(name, rules, unknown, progress)
    id = found.stub.id
    known = catalogue.known([id], base=base or None).get(id)
    stored = catalogue.get(id, base=base or None) if known is not None else None
    if known is not None and stored is not None and stored.status in USABLE and found.is_same(known):
        return stored
    try:
        row = usable(found.read(stored), whole=whole)
    except NetworkError as error:
        raise _both(unknown, error, found.stub.repo) from error
    if store:
        catalogue.add([row], {id: found.hub_id}, base=base)
    announce(f"{id}: taken from the Hub at {row.commit[:12]}")
    return row


def pinned(catalogue: Catalogue, text: str, progress: Progress = silent) -> Adapter:
    """The row for `text`, else one from the Hub's listing; its files are not read and nothing is stored.

    Raises NothingMatched, AccessDenied and NetworkError as `look_up` does.
    """
    try:
        return catalogue.named(text)
    except NothingMatched as error:
        name = _read(catalogue, text)
        unknown = _unknown(name, error)
    rules = Rules("", (), lambda: None, with_skeleton=False)
    return _older(catalogue, name) or _on_hub(name, rules, unknown, progress).stub


def usable(row: Adapter, *, whole: bool = False) -> Adapter:
    """`row`, if its adapter is usable: AccessDenied or Refused with its reason if not.

    whole: also accept an adapter that holds modules saved whole beside its update.
    """
    if row.status == "gated":
        raise AccessDenied(
            f"{row.id}: {row.reason}",
            hint=f"ask for access on its page, run hf auth login, then lora pool fetch {row.id}",
        )
    if row.status not in USABLE and not (whole and only_saved_whole(row.reason)):
        raise Refused(f"{row.id}: {row.reason}", hint=_way_out(row))
    return row


def _way_out(row: Adapter) -> str:
    """A hint for an adapter that cannot be used."""
    if only_saved_whole(row.reason):
        return TAKE_THE_UPDATE
    if row.base_match == "mismatch":
        return "sync its own base to use it there, or name its folder"
    return NAME_THE_BASE if names_no_base(row) else "leave this adapter out"


def names_no_base(row: Adapter) -> bool:
    """Whether a missing base model is the only fault of an adapter."""
    return row.status == "unusable" and row.reason.startswith(UNDECLARED)


def names_of(catalogue: Catalogue, base: str | None, aliases: Iterable[str]) -> tuple[str, ...]:
    """`aliases`, and the other names of `base` from earlier syncs."""
    return tuple(dict.fromkeys([*aliases, *(alias for alias, meant in catalogue.aliases().items() if meant == base)]))


class _Name(NamedTuple):
    """The user's text as a name on the Hub, with what the catalogue knows of the adapter with this id."""

    text: str
    id: str
    revision: str
    known: Known | None


def _read(catalogue: Catalogue, text: str) -> _Name:
    id, revision = id_and_revision(text)
    return _Name(text, id, revision, catalogue.known([id]).get(id))


def _older(catalogue: Catalogue, name: _Name) -> Adapter | None:
    """A catalogued adapter of the Hub at the other commit that the name pins, if its files are in the cache."""
    if name.known is None or not is_commit(name.revision):
        return None
    row = replace(catalogue.get(name.id), commit=name.revision, sha256="", norm=None, status="ok", reason="")
    return row if row.source == "hub" and locate(row.ref) is not None else None


def _unknown(name: _Name, error: NothingMatched) -> NothingMatched:
    """The catalogue's `error` about a name; also about a folder, if one can be meant."""
    like, folder = folders_like(name.text), means_folder(name.text)
    if not (like or folder) or name.known is not None:
        return error
    others = [one for one in like if one not in error.hint]
    hints = [meant(others)] if others else []
    if folder and repo_and_folder(name.text):
        hints.append(f"a repository of the Hub is {name.text}@main")
    return NothingMatched(
        f"{name.text}: no such folder and not in the catalogue", hint=" · ".join([*hints, error.hint])
    )


def _on_hub(name: _Name, rules: Rules, unknown: NothingMatched, progress: Progress) -> Found:
    """The adapter of this name on the Hub; raises `unknown` if the Hub must not be asked."""
    parts = repo_and_folder(name.id)
    # Never replace a local folder, or a row from a folder, by a stranger's repository of the same name.
    if parts is None or os.path.exists(name.id):  # noqa: PTH110 - this one never raises
        raise unknown
    repo, folder = parts
    if means_folder(name.text) if name.known is None else name.known.repo != repo:
        raise unknown
    reader = HubReader(Hub(progress=progress), rules)
    try:
        return reader.one(repo, name.revision, folder)
    except (NothingMatched, NetworkError) as error:
        raise _both(unknown, error, repo) from error


def _both(
    unknown: NothingMatched, error: NothingMatched | NetworkError, repo: str = ""
) -> NothingMatched | NetworkError:
    """The Hub's error with the catalogue's suggestions added."""
    reason = error.message.removeprefix(f"{repo}: ")
    return type(error)(f"{unknown.message}, and {reason}", hint=" · ".join(filter(None, (unknown.hint, error.hint))))
