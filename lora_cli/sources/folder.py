"""A folder tree as a source. Its adapters are on this machine, so their weights are read too."""

import hashlib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from lora_cli.catalogue.adapters import Catalogue
from lora_cli.catalogue.rows import Known
from lora_cli.checks.rules import Rules
from lora_cli.errors import DataError, HeaderError, NothingMatched
from lora_cli.files import special_kind
from lora_cli.formats.card import datasets_of, licence_of, read_card
from lora_cli.formats.factors import only_saved_whole
from lora_cli.formats.header import Header, read_header
from lora_cli.formats.kinds import CONFIG_NAME, WEIGHTS_NAME, holds_adapter
from lora_cli.formats.store import files_in, folder_ref
from lora_cli.imports import file_of, find
from lora_cli.records import USABLE, Adapter, AdapterRow, Progress
from lora_cli.settings import folder_of
from lora_cli.sources import Found, Sought, Source, refuse

_BATCH = 256
_WEIGHTS = (".safetensors", ".gguf")


def folder(place: str, budget: int | None, progress: Progress) -> Source:
    """The folder tree at the path `place`."""
    return FolderSource(Path(place))


def is_unchanged(row: AdapterRow) -> bool:
    """Whether the files of a catalogued folder have the sizes and times of the last sync, or are not here."""
    folder = Path(row.repo)
    names = _names(folder)
    return not any(name.endswith(_WEIGHTS) for name in names) or row.stamp.partition(":")[0] == _stamp(folder, names)


class FolderSource(Source):
    """The adapters in the folders below one folder."""

    def __init__(self, root: Path) -> None:
        found = folder_of(str(root))
        if found is None:
            raise NothingMatched(f"{root}: no such folder", hint="give a folder whose subfolders hold adapters")
        self._root = found.resolve()
        self.name = str(self._root)

    def batches(self, sought: Sought, progress: Progress) -> Iterator[list[Found]]:
        folders = []
        for folder in _adapter_folders(self._root):
            folders.append(folder)
            progress("looking for adapters", len(folders), 0)
        folders, lost = sorted(folders)[: sought.limit], _Lost(sought.catalogue)
        for start in range(0, len(folders), _BATCH):
            batch = folders[start : start + _BATCH]
            ids = {folder: self._id(folder) for folder in batch}
            known = sought.catalogue.known(list(ids.values()))
            there = sought.catalogue.ids_of(source="folder", at=[_text(str(folder)) for folder in batch])
            placed = {row.repo: id for id, row in sought.catalogue.known(there).items()}
            own = {folder: _own(id, folder, known, placed) for folder, id in ids.items()}
            new = [folder for folder, id in own.items() if id not in known and id not in placed.values()]
            own |= {folder: lost.moved_to(folder, own[folder]) for folder in new}
            yield [self._found(folder, id, sought.rules) for folder, id in own.items()]

    def vanished(self, sought: Sought, seen: Collection[str]) -> list[str]:
        name, root = self._id(self._root), _text(str(self._root))
        known = sought.catalogue.known([id for id in sought.catalogue.ids_of(source="folder") if id not in seen])
        return [id for id, row in known.items() if _below(row.repo, root) or (_below(id, name) and _is_gone(row.repo))]

    def _id(self, folder: Path) -> str:
        return _text("/".join((self._root.name, *folder.relative_to(self._root).parts)))

    def _found(self, folder: Path, id: str, rules: Rules) -> Found:
        parts = folder.relative_to(self._root).parts
        names = _names(folder)
        files = _stamp(folder, names)
        stub = Adapter(
            id=id,
            commit="0" * 40,
            source="folder",
            repo=_text(str(folder)),
            author=_text(parts[0]) if len(parts) > 1 else "",
            stamp=f"{files}:{rules.digest}",
        )
        named = stub.repo == str(folder)
        return Found(
            stub=stub,
            is_same=lambda known: (known.stamp, known.repo) == (stub.stamp, stub.repo),
            read=partial(_read, rules, stub, folder, names)
            if named
            else partial(refuse, stub, "its path is not valid Unicode"),
        )


def _read(rules: Rules, stub: Adapter, folder: Path, names: Sequence[str], row: Adapter | None) -> Adapter:
    """`stub` with the facts from the folder's files; unchanged weights are not read again."""
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if kind := special_kind(folder / name):
            return refuse(stub, f"{name} is {kind}, not a file", row)
    card = read_card(folder)
    stub = replace(
        stub,
        commit=folder_ref(folder).commit,
        card=card,
        licence=licence_of(card),
        datasets=datasets_of(card),
        modified_at=_modified(folder, names),
    )
    config, weights, converted, kind = files_in(folder, names)
    header: Header | HeaderError | None = None
    if weights is not None:
        try:
            header = read_header(weights)
        except HeaderError as error:
            header = error
    adapter = replace(stub, **rules.judge(config, header, names, kind))
    if converted:
        adapter = replace(adapter, notes="; ".join(filter(None, [converted, adapter.notes])))
    if special := special_kind(folder / "README.md"):
        adapter = replace(adapter, notes="; ".join(filter(None, [adapter.notes, f"README.md is {special}: no card"])))
    if row is not None and row.commit == adapter.commit and row.sha256:
        adapter = replace(adapter, sha256=row.sha256, norm=row.norm)
        if row.status in USABLE:
            return adapter
    sound = adapter.status == "ok" or only_saved_whole(adapter.reason)
    if not sound or config is None or weights is None or not isinstance(header, Header):
        return adapter
    from lora_cli.checks.weights import weighed

    return weighed(adapter, weights, header, config, rules.skeleton())


class _Lost:
    """The catalogued folders that are no longer at their places."""

    def __init__(self, catalogue: Catalogue) -> None:
        known = catalogue.known(catalogue.ids_of(source="folder"))
        self._lost = {id: row for id, row in known.items() if _is_gone(row.repo)}

    def moved_to(self, folder: Path, id: str) -> str:
        """The id of the lost adapter that is now in `folder`, byte for byte; `id` if there is none."""
        if not self._lost:
            return id
        try:
            commit = folder_ref(folder).commit
        except (DataError, OSError):
            return id
        same = [lost for lost, row in self._lost.items() if row.commit == commit]
        found = max(same, key=lambda lost: Path(lost).name == folder.name, default="")
        if not found:
            return id
        del self._lost[found]
        return found


def _own(id: str, folder: Path, known: Mapping[str, Known], placed: Mapping[str, str]) -> str:
    """The id of the row for this folder, else `id`, or its path where `id` belongs to another place still there."""
    here = _text(str(folder))
    if id in known and known[id].repo == here:
        return id
    if here in placed:
        return placed[here]
    if id not in known:
        return id
    # A moved tree keeps its ids; a Hub row of the same id has no folder.
    was = known[id].repo
    return id if Path(was).is_absolute() and _is_gone(was) else here


def _below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder}/")


def _text(path: str) -> str:
    """`path` with bytes that are not Unicode escaped: neither a database nor JSON can hold them."""
    return path.encode("utf-8", "backslashreplace").decode()


def _adapter_folders(root: Path) -> Iterator[Path]:
    """Folders that hold an adapter's files. Links are followed; each real folder is visited once."""
    entered: set[tuple[int, int]] = set()
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        try:
            facts = folder.stat()
            if (facts.st_dev, facts.st_ino) in entered:
                continue
            entered.add((facts.st_dev, facts.st_ino))
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            continue
        names = [entry.name for entry in entries]
        if holds_adapter(folder, names) or (any(name.endswith(".gguf") for name in names) and find(folder) is not None):
            yield from _adapters_in(folder, names)
        for entry in reversed(entries):
            if not entry.name.startswith(".") and _is_folder(entry):
                waiting.append(folder / entry.name)


def _adapters_in(folder: Path, names: Collection[str]) -> Iterator[Path]:
    """A folder that holds an adapter; its files, if each is an adapter of another program by itself."""
    found = None if WEIGHTS_NAME in names else find(folder)
    yield from [folder] if found is None else found.adapters


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_gone(place: str) -> bool:
    """Whether a catalogued adapter is no longer at its place."""
    return folder_of(place) is None and file_of(place) is None


def _holder(place: Path) -> Path:
    """The folder of an adapter, which may be one file of it."""
    return place if file_of(str(place)) is None else place.parent


def _names(place: Path) -> tuple[str, ...]:
    """The names of the files of an adapter, and of those beside them."""
    if file_of(str(place)) is not None:
        return (place.name, CONFIG_NAME)
    try:
        return tuple(sorted(path.name for path in place.iterdir()))
    except OSError:
        return ()


def _stamp(folder: Path, names: Sequence[str]) -> str:
    """A stamp that changes with the size or time of any relevant file."""
    parts: list[Any] = []
    for name in names:
        if name == "README.md" or name.startswith("adapter") or name.endswith(_WEIGHTS):
            try:
                facts = (_holder(folder) / name).stat()
            except OSError:
                continue
            parts.append((name, facts.st_size, facts.st_mtime_ns))
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _modified(folder: Path, names: Sequence[str]) -> str:
    weights = [name for name in names if name.endswith(_WEIGHTS)]
    name = WEIGHTS_NAME if WEIGHTS_NAME in names else next(iter(weights), CONFIG_NAME)
    try:
        seconds = (_holder(folder) / name).stat().st_mtime
    except OSError:
        return ""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
