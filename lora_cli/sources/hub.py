"""A Hub as a source: the adapters of a base model and of its aliases, by the Hub's listing."""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial

from lora_cli.catalogue.rows import Known
from lora_cli.checks.rules import Rules
from lora_cli.errors import AccessDenied, ConfigError, HeaderError, NetworkError, NothingMatched
from lora_cli.formats.base_names import same_base, split_revision
from lora_cli.formats.config import MAX_CONFIG_BYTES, parse_config
from lora_cli.formats.header import Header
from lora_cli.formats.kinds import CONFIG_NAME, WEIGHTS_NAME, other_kind
from lora_cli.formats.remote_header import probe_header
from lora_cli.hub.client import Hub
from lora_cli.hub.listing import Listed, is_id
from lora_cli.hub.patience import BudgetSpent
from lora_cli.hub.problems import Absent, Gated, MissingFile
from lora_cli.hub.session import login_mark
from lora_cli.names import in_repo, is_folder, is_model
from lora_cli.records import Adapter, Progress
from lora_cli.sources import Found, Sought, Source, refuse
from lora_cli.text import size

_PROBE_BYTES = 4096
_LARGEST_GUESS = 65_536
_MOST_VANISHED = 50
_MOST_SUBFOLDERS = 16
_MOST_COPIES = 20
# Copies in forms that nobody trains on.
_UNTRAINABLE = re.compile(r"gguf|exl\d|onnx|mlx|-i1|imat|openvino", re.IGNORECASE)
_OVER = ":over:"
_CHECKPOINT = re.compile(r"(?:^|/)(?:checkpoint|step|epoch)[-_]?\d+$", re.IGNORECASE)


def hub(place: str, budget: int | None, progress: Progress) -> Source:
    """The Hub at the endpoint `place`, "" for the usual one."""
    return HubSource(Hub(place, progress=progress, budget=budget))


class AskingSource(Source):
    """A source that asks a Hub."""

    def __init__(self, name: str, hub: Hub) -> None:
        self.name, self._hub = name, hub

    @property
    def traffic(self) -> tuple[int, int]:
        return self._hub.traffic

    def stop(self) -> None:
        self._hub.stop()


class HubSource(AskingSource):
    """The adapters of a base model, and of its aliases, on a Hub."""

    needs_base = True

    def __init__(self, hub: Hub) -> None:
        super().__init__(hub.endpoint, hub)
        self._resumed = False

    def batches(self, sought: Sought, progress: Progress) -> Iterator[list[Found]]:
        reader = HubReader(self._hub, sought.rules, sought.max_bytes)
        count = 0
        listings, place = sought.catalogue.listings, (self.name, sought.rules.base)
        for base in self._names(sought):
            for author in sought.authors or ("",):
                left = None if sought.limit is None else sought.limit - count
                if left is not None and left <= 0:
                    return
                start = listings.next_page(*place, base) if sought.whole else ""
                self._resumed = self._resumed or bool(start)
                pages = self._hub.list_adapters(base, author=author, since=sought.since, limit=left, start=start)
                for page in pages:
                    count += len(page.repositories)
                    progress("listing", count, 0)
                    yield [found for listed in page.repositories for found in reader.all_in(listed)]
                    # Whoever asks for more has stored this page.
                    if sought.whole and not sought.dry_run and (start or page.following):
                        start = page.following
                        listings.remember(*place, base, page.following)

    def _names(self, sought: Sought) -> Iterator[str]:
        """The names whose adapters are listed: the base, its aliases, its copies that have adapters."""
        rules = sought.rules
        named = [rules.base, *(alias for alias in rules.aliases if is_model(split_revision(alias)[0]))]
        # A listing covers the repository, not a single revision.
        names = dict.fromkeys(split_revision(name)[0] for name in named)
        yield from names
        if not sought.copies:
            return
        known = sought.catalogue.listings.copies(self.name, rules.base)
        copies = self._copies(split_revision(rules.base)[0]) if known is None else known
        yield from (name for name in copies if name not in names)
        if known is None and not sought.dry_run:
            there = {split_revision(row.base_declared)[0] for row in sought.catalogue.find(base=rules.base)}
            sought.catalogue.listings.remember_copies(self.name, rules.base, [name for name in copies if name in there])

    def _copies(self, base: str) -> list[str]:
        """The copies of a base by the tables of names: quantised ones that the Hub knows, mirrors of the same name."""
        named = self._hub.names_of_models(filter=f"base_model:quantized:{base}")
        named += self._hub.names_of_models(search=base.rpartition("/")[2])
        copies = [name for name in dict.fromkeys(named) if name != base and same_base(name, base)]
        return [name for name in copies if not _UNTRAINABLE.search(name)][:_MOST_COPIES]

    def vanished(self, sought: Sought, seen: Collection[str]) -> list[str]:
        if self._resumed:
            return []  # the pages before the first one of this sync were not seen
        missing = [id for id in sought.catalogue.ids_of(source="hub", base=sought.rules.base) if id not in seen]
        if len(missing) > _MOST_VANISHED:
            # A truncated listing is likelier than so many deletions in one day.
            return []
        gone = set()
        for repo in dict.fromkeys(id.partition(":")[0] for id in missing):
            try:
                if not self._hub.exists(repo):
                    gone.add(repo)
            except (AccessDenied, NothingMatched):
                continue  # the next sync asks again
            except (NetworkError, BudgetSpent):
                break
        return [id for id in missing if id.partition(":")[0] in gone]


class HubReader:
    """Adapters of a Hub, judged by `rules`: from a repository's entry in the listing to the facts about its adapters.

    Only configurations and headers are read, never weights.
    """

    def __init__(self, hub: Hub, rules: Rules, max_bytes: int | None = None) -> None:
        self._hub = hub
        self._max_bytes = max_bytes
        self._rules = rules
        self._probe = _PROBE_BYTES
        # Access to a gated repo can change without a new commit: ask again after a day or under another login.
        self._gate = f"{rules.digest}:{login_mark()}:{datetime.now(UTC):%Y%m%d}"

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

    def all_in(self, listed: Listed) -> Iterator[Found]:
        """The adapters in one repository: at its top, else in its subfolders."""
        return (self._found(listed, folder) for folder in _folders(listed.files))

    def _found(self, listed: Listed, folder: str) -> Found:
        stub = Adapter(
            id=in_repo(listed.id, folder),
            commit=listed.commit,
            source="hub",
            repo=listed.id,
            subfolder=folder,
            author=listed.author,
            base_declared=listed.base,
            licence=listed.licence,
            datasets=listed.datasets,
            downloads=listed.downloads,
            likes=listed.likes,
            gated=listed.gated,
            created_at=listed.created_at,
            modified_at=listed.modified_at,
            card=listed.card,
            stamp=self._rules.digest,
        )
        prefix = f"{folder}/" if folder else ""
        names = tuple(n.removeprefix(prefix) for n in listed.files if n.startswith(prefix))
        problem = _unreadable(listed, names)
        return Found(
            stub=stub,
            is_same=partial(self._is_same, stub),
            read=partial(refuse, stub, problem) if problem else partial(self._read, stub, names),
            hub_id=listed.hub_id,
        )

    def _is_same(self, stub: Adapter, known: Known) -> bool:
        if known.status == "gated":
            return known.commit == stub.commit and known.stamp == self._gate
        if known.stamp.startswith(f"{stub.stamp}{_OVER}"):
            held = int(known.stamp.rpartition(":")[2])
            return known.commit == stub.commit and self._max_bytes is not None and held > self._max_bytes
        # A new alias can change the verdict only for adapters that do not declare this base by its exact name.
        asked = self._rules.base
        names_it = (known.base_declared, known.base) == (split_revision(asked)[0], asked)
        about_it = known.stamp.partition(":")[0] == stub.stamp.partition(":")[0]
        return known.commit == stub.commit and (known.stamp == stub.stamp or (names_it and about_it))

    def _read(self, stub: Adapter, names: tuple[str, ...], row: Adapter | None) -> Adapter:
        prefix = f"{stub.subfolder}/" if stub.subfolder else ""
        try:
            config = self._hub.read_file(stub.repo, prefix + CONFIG_NAME, stub.commit, MAX_CONFIG_BYTES)
            if refusal := _refusal(config):
                # The configuration already rules the adapter out, so its header is not requested.
                judged = replace(stub, **self._rules.judge(config, None, names))
                return replace(judged, status="unusable", reason=_other_kind(names) or refusal)
            header, sha256 = self._header(stub, prefix + WEIGHTS_NAME) if WEIGHTS_NAME in names else (None, "")
        except Gated:
            return replace(stub, status="gated", reason="gated: the owner must grant you access", stamp=self._gate)
        except MissingFile:
            return replace(stub, status="unusable", reason=f"{CONFIG_NAME} or {WEIGHTS_NAME} is listed but missing")
        except Absent as error:
            return replace(stub, status="gone", reason=error.message)
        adapter = replace(stub, **self._rules.judge(config, header, names), hub_sha256=sha256)
        if self._max_bytes is not None and adapter.bytes > self._max_bytes:
            reason = f"{size(adapter.bytes)} of weights, more than --max-size {size(self._max_bytes)}"
            stamp = f"{stub.stamp}{_OVER}{adapter.bytes}"
            return replace(adapter, status="unusable", reason=reason, stamp=stamp)
        return _kept(adapter, row)

    def _header(self, stub: Adapter, file: str) -> tuple[Header | HeaderError, str]:
        header, needed, sha256 = probe_header(self._hub, stub, file, self._probe)
        # Adapters of one base have headers of similar length: the next request can get the whole header.
        self._probe = max(self._probe, min(-(-needed // 4096) * 4096, _LARGEST_GUESS))
        return header, sha256


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
    if not is_id(listed.id):
        return "its name is none that the Hub's client takes"
    if not listed.files_known:
        return "its list of files is too long, or not shown"
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
    return f"name {' or '.join(in_repo(repo, folder) for folder in folders)}"


def _subfolders(names: Collection[str]) -> list[str]:
    folders = sorted(name.rpartition("/")[0] for name in names if name.endswith(f"/{CONFIG_NAME}"))
    plain = [
        folder for folder in folders if is_folder(folder) and folder.count("/") < 2 and not _CHECKPOINT.search(folder)
    ]
    return plain[:_MOST_SUBFOLDERS]
