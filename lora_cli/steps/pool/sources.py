"""Sources of adapters for a sync: the listing of a Hub, or a folder tree. Each yields batches of unread adapters."""

import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from lora_cli.catalogue.adapters import Catalogue, Known
from lora_cli.checks.examine import Facts, examine
from lora_cli.errors import ConfigError, HeaderError, NothingMatched, Refused
from lora_cli.formats.base_names import split_revision, tables_digest
from lora_cli.formats.config import MAX_CONFIG_BYTES, parse_config
from lora_cli.formats.factors import only_saved_whole
from lora_cli.formats.header import Header, header_length, parse_header, read_header
from lora_cli.formats.kinds import CONFIG_NAME, WEIGHTS_NAME, holds_adapter, kind_in, other_kind
from lora_cli.formats.skeleton import Skeleton
from lora_cli.formats.store import folder_ref, read_config
from lora_cli.hub.client import Gated, Hub, Listed, MissingFile, login_mark
from lora_cli.records import Adapter, Progress
from lora_cli.settings import folder_of

_PROBE_BYTES = 4096
_LARGEST_GUESS = 65_536
_CARD_BYTES = 65_536
_MOST_VANISHED = 50
_MOST_SUBFOLDERS = 16
_FOLDER_BATCH = 256
_SUBFOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}(/[A-Za-z0-9][A-Za-z0-9._-]{0,99})?")
_CHECKPOINT = re.compile(r"(?:^|/)(?:checkpoint|step|epoch)[-_]?\d+$", re.IGNORECASE)
_FRONT_MATTER_LICENCE = re.compile(r"^license(?:_name)?:[ \t]*['\"]?([^\s'\"#]+)", re.MULTILINE)


@dataclass(frozen=True)
class Ask:
    """The rules for judging adapters: the base asked for ("" for any), the base's other names, and its modules.

    The base is `name@revision` if it is not on the main branch. `with_skeleton`: judge every adapter by the base's
    modules, not only an adapter without a declared base. `vouched`: the user named base and adapter.
    """

    base: str
    aliases: tuple[str, ...]
    skeleton: Callable[[], Skeleton | None]
    with_skeleton: bool
    vouched: bool = False

    @cached_property
    def digest(self) -> str:
        """A text that is equal for equal rules: a row with another stamp was judged by other rules.

        The part before the colon is equal for rules about one base.
        """
        rules = [self.base, str(self.with_skeleton), str(self.vouched), tables_digest(), *sorted(set(self.aliases))]
        return f"{_digest(self.base)}:{_digest(chr(0).join(rules))}"

    def judge(
        self, config: bytes | None, header: Header | HeaderError | None, names: Collection[str], kind: str = ""
    ) -> Facts:
        """`checks.examine` by these rules."""
        wanted = isinstance(header, Header) and (self.with_skeleton or _names_no_base(config))
        return examine(
            config,
            header,
            file_names=names,
            base_name=self.base,
            base_aliases=self.aliases,
            skeleton=self.skeleton() if wanted else None,
            vouched=self.vouched,
            kind=kind,
        )


@dataclass(frozen=True)
class Found:
    """An adapter at its source: `stub` holds the facts from the listing, `read` reads the rest.

    `read` gets the stored row, if there is one. It raises NetworkError, DataError or OSError for failures that may
    pass.
    """

    stub: Adapter
    is_same: Callable[[Known], bool]
    read: Callable[[Adapter | None], Adapter]
    hub_id: str = ""


class Source(ABC):
    """A place that holds adapters; `name` is stored with the sync."""

    name: str

    @abstractmethod
    def batches(self, progress: Progress) -> Iterator[list[Found]]:
        """All adapters of the source, in batches."""

    @abstractmethod
    def vanished(self, catalogue: Catalogue, seen: Collection[str]) -> list[str]:
        """Ids of stored rows from this source that are not in `seen` and no longer at the source."""

    def stop(self) -> None:  # noqa: B027 - most sources have nothing to stop
        """Cancel the requests that other threads wait for."""


class HubSource(Source):
    """The adapters of a base model, and of its aliases, on a Hub."""

    def __init__(self, hub: Hub, ask: Ask, limit: int | None, since: str) -> None:
        self.name = hub.endpoint
        self._hub = hub
        self._ask = ask
        self._limit = limit
        self._since = since
        self._probe = _PROBE_BYTES
        # Access to a gated repo can change without a new commit: ask again after a day or under another login.
        self._gate = f"{ask.digest}:{login_mark()}:{datetime.now(UTC):%Y%m%d}"

    def stop(self) -> None:
        self._hub.stop()

    def batches(self, progress: Progress) -> Iterator[list[Found]]:
        count = 0
        named = [self._ask.base, *(alias for alias in self._ask.aliases if is_hub_name(alias))]
        # A listing covers the repository, not a single revision.
        for base in dict.fromkeys(split_revision(name)[0] for name in named):
            left = None if self._limit is None else self._limit - count
            if left is not None and left <= 0:
                return
            for page in self._hub.list_adapters(base, since=self._since, limit=left):
                count += len(page)
                progress("listing", count, 0)
                yield [found for listed in page for found in self._in(listed)]

    def vanished(self, catalogue: Catalogue, seen: Collection[str]) -> list[str]:
        missing = [id for id in catalogue.ids_of(source="hub", base=self._ask.base) if id not in seen]
        if len(missing) > _MOST_VANISHED:
            # A truncated listing is likelier than so many deletions in one day.
            return []
        gone = {repo: not self._hub.exists(repo) for repo in {id.partition(":")[0] for id in missing}}
        return [id for id in missing if gone[id.partition(":")[0]]]

    def one(self, repo: str, revision: str = "", subfolder: str = "") -> Found:
        """The adapter of one repository at a branch, tag or commit, by one request.

        Raises NothingMatched where there is none in `subfolder`, or several to choose from, and the errors of the Hub.
        """
        listed = self._hub.repository(repo, revision)
        held = _folders(listed.files)
        if subfolder and f"{subfolder}/{CONFIG_NAME}" not in listed.files:
            raise NothingMatched(f"{repo}: no adapter in its folder {subfolder}", hint=_choice(listed.id, held))
        if not subfolder and len(held) > 1:
            raise NothingMatched(f"{repo}: it holds {len(held)} adapters", hint=_choice(listed.id, held))
        return self._found(listed, subfolder or held[0])

    def _in(self, listed: Listed) -> Iterator[Found]:
        """The adapters in one repository: at its top, else in its subfolders."""
        return (self._found(listed, folder) for folder in _folders(listed.files))

    def _found(self, listed: Listed, folder: str) -> Found:
        stub = Adapter(
            id=f"{listed.id}:{folder}" if folder else listed.id,
            commit=listed.commit,
            source="hub",
            repo=listed.id,
            subfolder=folder,
            author=listed.author,
            base_declared=listed.base,
            licence=listed.licence,
            downloads=listed.downloads,
            likes=listed.likes,
            gated=listed.gated,
            created_at=listed.created_at,
            modified_at=listed.modified_at,
            card=listed.card,
            stamp=self._ask.digest,
        )
        prefix = f"{folder}/" if folder else ""
        names = tuple(n.removeprefix(prefix) for n in listed.files if n.startswith(prefix))
        problem = _unreadable(listed, names)
        return Found(
            stub=stub,
            is_same=partial(self._is_same, stub),
            read=partial(_refuse, stub, problem) if problem else partial(self._read, stub, names),
            hub_id=listed.hub_id,
        )

    def _is_same(self, stub: Adapter, known: Known) -> bool:
        if known.status == "gated":
            return known.commit == stub.commit and known.stamp == self._gate
        # A new alias can change the verdict only for adapters that do not declare this base by its exact name.
        asked = self._ask.base
        names_it = (known.base_declared, known.base) == (split_revision(asked)[0], asked)
        about_it = known.stamp.partition(":")[0] == stub.stamp.partition(":")[0]
        return known.commit == stub.commit and (known.stamp == stub.stamp or (names_it and about_it))

    def _read(self, stub: Adapter, names: tuple[str, ...], row: Adapter | None) -> Adapter:
        prefix = f"{stub.subfolder}/" if stub.subfolder else ""
        try:
            config = self._hub.read_file(stub.repo, prefix + CONFIG_NAME, stub.commit, MAX_CONFIG_BYTES)
            if refusal := _refusal(config):
                # The configuration already rules the adapter out, so its header is not requested.
                judged = replace(stub, **self._ask.judge(config, None, names))
                return replace(judged, status="unusable", reason=_other_kind(names) or refusal)
            header = self._header(stub, prefix + WEIGHTS_NAME) if WEIGHTS_NAME in names else None
        except Gated:
            return replace(stub, status="gated", reason="gated: the owner must grant you access", stamp=self._gate)
        except MissingFile:
            return replace(stub, status="unusable", reason=f"{CONFIG_NAME} or {WEIGHTS_NAME} is listed but missing")
        except NothingMatched as error:
            return replace(stub, status="gone", reason=error.message)
        return _kept(replace(stub, **self._ask.judge(config, header, names)), row)

    def _header(self, stub: Adapter, file: str) -> Header | HeaderError:
        header, needed = probe_header(self._hub, stub, file, self._probe)
        # Adapters of one base have headers of similar length: the next request can get the whole header.
        self._probe = max(self._probe, min(-(-needed // 4096) * 4096, _LARGEST_GUESS))
        return header


class FolderSource(Source):
    """The adapters in the folders below one folder. They are local, so their weights are read too."""

    def __init__(self, root: Path, ask: Ask, catalogue: Catalogue, limit: int | None) -> None:
        found = folder_of(str(root))
        if found is None:
            raise NothingMatched(f"{root}: no such folder", hint="give a folder whose subfolders hold adapters")
        self._root = found.resolve()
        self.name = str(self._root)
        self._ask = ask
        self._catalogue = catalogue
        self._limit = limit

    def batches(self, progress: Progress) -> Iterator[list[Found]]:
        folders = []
        for folder in _adapter_folders(self._root):
            folders.append(folder)
            progress("looking for adapters", len(folders), 0)
        folders = sorted(folders)[: self._limit]
        for start in range(0, len(folders), _FOLDER_BATCH):
            batch = folders[start : start + _FOLDER_BATCH]
            ids = {folder: self._id(folder) for folder in batch}
            known = self._catalogue.known(list(ids.values()))
            yield [self._found(folder, _own(id, folder, known)) for folder, id in ids.items()]

    def vanished(self, catalogue: Catalogue, seen: Collection[str]) -> list[str]:
        name, root = self._id(self._root), _text(str(self._root))
        known = catalogue.known([id for id in catalogue.ids_of(source="folder") if id not in seen])
        return [
            id
            for id, row in known.items()
            if _below(row.repo, root) or (_below(id, name) and folder_of(row.repo) is None)
        ]

    def _id(self, folder: Path) -> str:
        return _text("/".join((self._root.name, *folder.relative_to(self._root).parts)))

    def _found(self, folder: Path, id: str) -> Found:
        parts = folder.relative_to(self._root).parts
        names = _names(folder)
        files = _stamp(folder, names)
        stub = Adapter(
            id=id,
            commit="0" * 40,
            source="folder",
            repo=_text(str(folder)),
            author=_text(parts[0]) if len(parts) > 1 else "",
            stamp=f"{files}:{self._ask.digest}",
        )
        named = stub.repo == str(folder)
        return Found(
            stub=stub,
            is_same=lambda known: (known.stamp, known.repo) == (stub.stamp, stub.repo),
            read=partial(self._read, stub, folder, names)
            if named
            else partial(_refuse, stub, "its path is not valid Unicode"),
        )

    def _read(self, stub: Adapter, folder: Path, names: Sequence[str], row: Adapter | None) -> Adapter:
        card = _card(folder)
        stub = replace(
            stub,
            commit=folder_ref(folder).commit,
            card=card,
            licence=_card_licence(card),
            modified_at=_modified(folder, names),
        )
        config = read_config(folder)
        header: Header | HeaderError | None = None
        kind = ""
        if (folder / WEIGHTS_NAME).is_file():
            try:
                header = read_header(folder / WEIGHTS_NAME)
            except HeaderError as error:
                header = error
        else:
            kind = kind_in(folder, names)
        adapter = replace(stub, **self._ask.judge(config, header, names, kind))
        if row is not None and row.commit == adapter.commit and row.sha256:
            adapter = replace(adapter, sha256=row.sha256, norm=row.norm)
            if row.status == "ok":
                return adapter
        sound = adapter.status == "ok" or only_saved_whole(adapter.reason)
        if not sound or config is None or not isinstance(header, Header):
            return adapter
        return weighed(adapter, folder / WEIGHTS_NAME, header, config, self._ask.skeleton())


def probe_header(hub: Hub, adapter: Adapter, file: str, guess: int) -> tuple[Header | HeaderError, int]:
    """The header of weights on the Hub, and the bytes read: one range request, two if `guess` was too short."""
    needed = 0
    try:
        first, size = hub.read_range(adapter.repo, file, adapter.commit, 0, guess)
        needed = 8 + header_length(first[:8], size)
        if needed > len(first):
            first += hub.read_range(adapter.repo, file, adapter.commit, len(first), needed).data
        return parse_header(first[:needed], size), needed
    except HeaderError as error:
        return error, needed


def weighed(
    adapter: Adapter, weights: Path, header: Header, config: bytes, skeleton: Skeleton | None = None
) -> Adapter:
    """`adapter` with the facts from its weights: SHA-256, norm, and whether they are sound."""
    from lora_cli.checks.weights import scan_weights, weight_status

    try:
        facts = scan_weights(weights, header, parse_config(config), skeleton)
    except (Refused, ConfigError, HeaderError) as error:
        return replace(adapter, status="unusable", reason=error.message)
    adapter = replace(adapter, sha256=facts.sha256, norm=facts.norm)
    status, reason = weight_status(facts)
    return adapter if status == "ok" else replace(adapter, status=status, reason=reason)


def _refuse(stub: Adapter, reason: str, row: Adapter | None) -> Adapter:
    return replace(stub, status="unusable", reason=reason)


def _kept(adapter: Adapter, row: Adapter | None) -> Adapter:
    """Carry over sha256, norm and verdict from the stored row if the weights are unchanged."""
    if row is None or row.commit != adapter.commit or not row.sha256:
        return adapter
    adapter = replace(adapter, sha256=row.sha256, norm=row.norm)
    if adapter.status == "ok" and row.status == "unusable":
        return replace(adapter, status=row.status, reason=row.reason)
    return adapter


def _unreadable(listed: Listed, names: Collection[str]) -> str:
    """The reason to skip a listed repository, "" if it is worth a request."""
    if listed.disabled:
        return "disabled by the Hub"
    if CONFIG_NAME in names:
        return ""
    if any(_CHECKPOINT.search(name.rpartition("/")[0]) for name in names if name.endswith(f"/{CONFIG_NAME}")):
        return f"no {CONFIG_NAME}, only training checkpoints"
    if kind := _other_kind(names):
        return kind
    if any(re.fullmatch(r"(pytorch_)?model.*\.(safetensors|bin)", name) for name in names):
        return f"no {CONFIG_NAME}: full weights, not an adapter"
    return f"no {CONFIG_NAME}"


def _other_kind(names: Collection[str]) -> str:
    return "" if WEIGHTS_NAME in names else other_kind(names)


def _names_no_base(config: bytes | None) -> bool:
    try:
        return config is not None and not parse_config(config).base
    except ConfigError:
        return False


def _refusal(config: bytes) -> str:
    """The reason why this configuration rules its adapter out whatever the weights are, "" for none."""
    try:
        return next(iter(parse_config(config).refusals()), "")
    except ConfigError as error:
        return error.message


def _folders(names: Collection[str]) -> list[str]:
    """The folders of a repository that hold adapters, "" for its top; only "" if there is no adapter."""
    return [""] if CONFIG_NAME in names else _subfolders(names) or [""]


def _choice(repo: str, folders: Sequence[str]) -> str:
    return f"name {' or '.join(f'{repo}:{folder}' if folder else repo for folder in folders)}"


def _subfolders(names: Collection[str]) -> list[str]:
    folders = sorted(name.rpartition("/")[0] for name in names if name.endswith(f"/{CONFIG_NAME}"))
    plain = [folder for folder in folders if _SUBFOLDER.fullmatch(folder) and not _CHECKPOINT.search(folder)]
    return plain[:_MOST_SUBFOLDERS]


def is_hub_name(name: str) -> bool:
    """Whether `name` is written like an id of the Hub, with or without owner and revision."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?(@.+)?", name) is not None and not name.startswith(".")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _own(id: str, folder: Path, known: Mapping[str, Known]) -> str:
    """`id`, or the folder's path where that id already belongs to another place that is still there."""
    here = _text(str(folder))
    if id not in known or known[id].repo == here:
        return id
    # A moved tree keeps its ids; a Hub row of the same id has no folder.
    was = known[id].repo
    return id if Path(was).is_absolute() and folder_of(was) is None else here


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
        if holds_adapter(folder, [entry.name for entry in entries]):
            yield folder
        for entry in reversed(entries):
            if not entry.name.startswith(".") and _is_folder(entry):
                waiting.append(folder / entry.name)


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _names(folder: Path) -> tuple[str, ...]:
    try:
        return tuple(sorted(path.name for path in folder.iterdir()))
    except OSError:
        return ()


def _stamp(folder: Path, names: Sequence[str]) -> str:
    """A stamp that changes with the size or time of any relevant file."""
    parts: list[Any] = []
    for name in names:
        if name == "README.md" or name.startswith("adapter") or name.endswith(".safetensors"):
            try:
                facts = (folder / name).stat()
            except OSError:
                continue
            parts.append((name, facts.st_size, facts.st_mtime_ns))
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _modified(folder: Path, names: Sequence[str]) -> str:
    name = WEIGHTS_NAME if WEIGHTS_NAME in names else CONFIG_NAME
    try:
        seconds = (folder / name).stat().st_mtime
    except OSError:
        return ""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _card(folder: Path) -> str:
    try:
        with (folder / "README.md").open("rb") as file:
            return file.read(_CARD_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""


def _card_licence(card: str) -> str:
    """The licence in a model card's YAML front matter."""
    if not card.startswith("---"):
        return ""
    front = card[3:].partition("\n---")[0]
    named = _FRONT_MATTER_LICENCE.findall(front)
    return next((name for name in named if name != "other"), named[0] if named else "")
