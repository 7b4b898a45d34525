"""Bring the catalogue up to date with a Hub or with a folder tree, reading only new or changed adapters.

From a Hub it reads the listing in pages, then adapter_config.json and the header of the weights of each new or
changed commit, never the weights. From a folder tree it reads all files of each new or changed adapter. What is read is
stored within a quarter of a second, so a killed sync resumes where it stopped.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from typing import Any, Literal

from lora_cli.catalogue.adapters import Catalogue
from lora_cli.catalogue.rows import Known
from lora_cli.checks.rules import Rules
from lora_cli.errors import AccessDenied, DataError, LoraError, NetworkError, NothingMatched, UsageError
from lora_cli.formats.base_names import at_revision
from lora_cli.formats.skeleton import Skeleton
from lora_cli.hub.patience import BudgetSpent
from lora_cli.hub.problems import Halted, Silent
from lora_cli.records import Adapter, Progress, silent
from lora_cli.sources import Found, Sought, Source
from lora_cli.steps.pool.lookup import names_of
from lora_cli.steps.pool.report import kind_of_reason

Action = Literal["new", "changed", "unchanged", "gone"]

_THREADS = 8
_MOST_NAMED = 8
_MOST_FAILURES_IN_A_ROW = 24
# A transaction takes longer than the reading of an adapter: those of this many seconds share one.
_SECONDS_PER_TRANSACTION = 0.25


@dataclass(slots=True)
class Outcomes:
    """What a sync has read, in numbers.

    `weeks` counts adapters by the ISO week in which they were made (2026-W09), `reasons` those that cannot be used by
    kind of reason, `authors` all by author.
    """

    weeks: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    authors: Counter[str] = field(default_factory=Counter)

    def add(self, adapter: Adapter) -> None:
        """Count one more."""
        with suppress(ValueError):
            year, week, _ = datetime.fromisoformat(adapter.created_at).isocalendar()
            self.weeks[f"{year}-W{week:02d}"] += 1
        if adapter.status != "ok":
            self.reasons[kind_of_reason(adapter.reason)] += 1
        if adapter.author:
            self.authors[adapter.author] += 1

    def most(self, count: int) -> dict[str, dict[str, int]]:
        """The last `count` weeks in their order, and the `count` most frequent reasons and authors."""
        reasons, authors = (
            dict(sorted(counts.items(), key=lambda one: (-one[1], one[0]))[:count])
            for counts in (self.reasons, self.authors)
        )
        return {"weeks": dict(sorted(self.weeks.items())[-count:]), "reasons": reasons, "authors": authors}


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """The outcome of a sync, or its plan.

    `new` and `changed` were read and stored. `unusable` counts the adapters of this source that are listed with a
    reason, `copies` the usable adapters whose weights another one of the base has. `near_copies` are those of the
    `sketched` ones that nearly equal another; nothing is known of adapters without a sketch. `failed` counts failures
    that may pass, `left` adapters that were not requested (budget spent, or the Hub unreachable): a rerun reads both.
    `pages` are the batches of the listing, `to_read` the adapters that had to be read, `read` tells what those are.
    `plan` maps every id to the planned action.
    """

    source: str
    base: str
    seen: int
    new: int
    changed: int
    unchanged: int
    failed: int
    unusable: int
    copies: int
    near_copies: int
    sketched: int
    gone: int
    left: int
    requests: int
    bytes: int
    seconds: float
    pages: int
    to_read: int
    read: "Outcomes"
    failures: tuple[tuple[str, str], ...]
    plan: tuple[tuple[str, Action], ...]

    @property
    def figures(self) -> dict[str, Any]:
        """The report without its lists, for programs."""
        left_out = ("plan", "failures", "read")
        return {key: getattr(self, key) for key in self.__slots__ if key not in left_out} | self.read.most(_MOST_NAMED)

    @property
    def complete(self) -> bool:
        """True if a rerun would read nothing more."""
        return not self.failed and not self.left


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncOptions:
    """The options of a sync.

    `aliases` are other names of the base, beside those that the catalogue remembers; on a Hub, adapters of these names
    are listed too. All are remembered. `dropped` are names that are no longer an alias; adapters that declare one of
    them become unusable. `limit` is the most adapters to look at. On a Hub, adapters created before the ISO time
    `since` are skipped. `force` reads unchanged adapters again. `dry_run` only plans: it reads the listing and stores
    nothing. `authors` are the only ones to look at on a Hub; adapters with more than `max_bytes` of weights there are
    refused. With `copies`, a Hub is also asked for adapters of quantised copies and mirrors of the base.
    """

    aliases: Sequence[str] = ()
    dropped: Sequence[str] = ()
    limit: int | None = None
    since: str = ""
    force: bool = False
    dry_run: bool = False
    authors: Sequence[str] = ()
    max_bytes: int | None = None
    copies: bool = False


def sync(
    catalogue: Catalogue,
    source: Source,
    options: SyncOptions | None = None,
    *,
    base: str = "",
    skeleton: Callable[[], Skeleton | None] | None = None,
    progress: Progress = silent,
) -> SyncReport:
    """Store every adapter of `source` in the catalogue.

    Args:
        base: the base model asked for: required with a source that lists the adapters of one base, such as a Hub;
            else "" accepts every base.
        skeleton: returns the base's modules on first need; None if they cannot be known.

    Raises:
        UsageError, NothingMatched: no base for a Hub, or no such folder.
        AccessDenied, NetworkError, OutputError: the source could not be listed, or the catalogue not be written;
            stored adapters stay.
    """
    begin, started = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    options = options or SyncOptions()
    dropped = options.dropped
    aliases = tuple(name for name in names_of(catalogue, base, options.aliases) if name not in dropped)
    if source.needs_base and not base:
        raise UsageError("no base model", hint="give its Hub id, or set base in lora.toml or LORA_BASE")
    find = cache(skeleton or _no_skeleton)
    rules = Rules(base, aliases, find, skeleton is not None)
    sought = Sought(
        catalogue=catalogue,
        rules=rules,
        limit=options.limit,
        since=options.since,
        authors=tuple(options.authors),
        max_bytes=options.max_bytes,
        copies=options.copies,
        dry_run=options.dry_run,
    )
    work = _Work(catalogue, source, find, base=base, force=options.force, dry_run=options.dry_run, progress=progress)
    if dropped and not options.dry_run:
        rows = [row.id for row in catalogue.find(base=base) if at_revision(row.base_declared, row.revision) in dropped]
        catalogue.mark(rows, "gone", "the name of its base is no longer an alias", base=base)
    for batch in source.batches(sought, progress):
        work.take(batch)
        if work.stopped:
            break
    if sought.whole and not work.stopped:
        work.remove(source.vanished(sought, work.actions))
    report = work.report(base, source.traffic, time.monotonic() - begin)
    if not options.dry_run:
        if base:
            catalogue.remember_aliases(base, aliases)
        catalogue.remember_sync(started, source.name, base, report.figures)
    return report


@dataclass
class _Work:
    """One running sync: the action for each adapter, and its outcome."""

    catalogue: Catalogue
    source: Source
    skeleton: Callable[[], Skeleton | None]
    base: str
    force: bool
    dry_run: bool
    progress: Progress
    actions: dict[str, Action] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    left: set[str] = field(default_factory=set)
    outcomes: Outcomes = field(default_factory=Outcomes)
    pages: int = 0
    stopped: bool = False
    _failed_in_a_row: int = 0
    _read_now: list[Adapter] = field(default_factory=list)
    _hub_ids: dict[str, str] = field(default_factory=dict)

    def take(self, batch: Sequence[Found]) -> None:
        """Plan one batch, then read and store its new and changed adapters."""
        self.pages += 1
        batch = [found for found in batch if found.stub.id not in self.actions]
        known = self.catalogue.known([found.stub.id for found in batch], base=self.base or None)
        popularity = {}
        to_read = []
        for found in batch:
            row = known.get(found.stub.id)
            action = self._action(found, row)
            self.actions[found.stub.id] = action
            if action != "unchanged":
                to_read.append(found)
            elif row is not None and (row.downloads, row.likes) != (found.stub.downloads, found.stub.likes):
                popularity[found.stub.id] = (found.stub.downloads, found.stub.likes)
        if self.dry_run:
            return
        if popularity:
            self.catalogue.refresh(popularity)
        if to_read:
            # What failed before comes last: it must not keep the others from being read, sync after sync.
            self._read(sorted(to_read, key=lambda found: _failed_before(found, known)), known)

    def remove(self, ids: Sequence[str]) -> None:
        """Mark rows whose adapters are no longer at the source."""
        self.actions.update((id, "gone") for id in ids)
        if ids and not self.dry_run:
            self.catalogue.mark(ids, "gone", "no longer at its source")

    def report(self, base: str, traffic: tuple[int, int], seconds: float) -> SyncReport:
        """The figures."""
        undone = self.failures.keys() | self.left
        count = {
            action: sum(did == action and id not in undone for id, did in self.actions.items())
            for action in ("new", "changed", "unchanged", "gone")
        }
        rows = self.catalogue.known(list(self.actions), base=self.base or None)
        to_read = sum(action in ("new", "changed") for action in self.actions.values())
        changed = bool(to_read) and not self.dry_run
        near, sketched = self._near_copies() if changed else (0, 0)
        return SyncReport(
            source=self.source.name,
            base=base,
            seen=len(self.actions) - count["gone"],
            **count,
            failed=len(self.failures),
            unusable=sum(row.status in ("unusable", "gated") for row in rows.values()),
            copies=self._copies() if changed else 0,
            near_copies=near,
            sketched=sketched,
            left=len(self.left),
            requests=traffic[0],
            bytes=traffic[1],
            seconds=seconds,
            pages=self.pages,
            to_read=to_read,
            read=self.outcomes,
            failures=tuple(self.failures.items()),
            plan=tuple(self.actions.items()),
        )

    def _copies(self) -> int:
        """The usable adapters whose weights another one of the base has, by the hashes that were read or stated."""
        facts = self.catalogue.candidates(("sha256", "hub_sha256"), base=self.base or None).facts
        known = [own or stated for own, stated in zip(facts["sha256"], facts["hub_sha256"], strict=True)]
        hashes = [one for one in known if one]
        return len(hashes) - len(set(hashes))

    def _near_copies(self) -> tuple[int, int]:
        """The sketched usable adapters that nearly equal another one, and how many were compared."""
        if not self.catalogue.sketches.of_base(self.base, 1):
            return 0, 0
        from lora_cli.steps.pool.sketched import near_copies

        return near_copies(self.catalogue, self.base)

    def _action(self, found: Found, row: Known | None) -> Action:
        if row is None or row.status == "failed":
            return "new"
        if self.force or row.status == "gone" or not found.is_same(row):
            return "changed"
        return "unchanged"

    def _read(self, batch: Sequence[Found], known: Mapping[str, Known]) -> None:
        """Read adapters in parallel and store them as they come in."""
        # First: no thread may ask the Hub while transformers reads the base, when all of the process is offline.
        self.skeleton()
        judged = known if not self.base else self.catalogue.known([found.stub.id for found in batch])
        with ThreadPoolExecutor(min(_THREADS, len(batch))) as pool:
            pending = {pool.submit(self._one, found, known, judged): found for found in batch}
            self.progress("reading adapters", 0, len(batch))
            stored = time.monotonic()
            try:
                for done, future in enumerate(as_completed(pending), 1):
                    self._take_in(future, pending[future], known)
                    if done == len(batch) or time.monotonic() - stored >= _SECONDS_PER_TRANSACTION:
                        self._store()
                        stored = time.monotonic()
                    self.progress("reading adapters", done, len(batch))
                    if self.stopped:
                        self.source.stop()
                        for other in pending:
                            other.cancel()
            except BaseException:
                self.source.stop()
                pool.shutdown(wait=False, cancel_futures=True)
                self._store()
                raise

    def _one(self, found: Found, known: Mapping[str, Known], judged: Mapping[str, Known]) -> Adapter:
        """Read one adapter; `known` are the verdicts for this base, `judged` those for any."""
        id = found.stub.id
        if id in known:
            return found.read(self.catalogue.get(id, base=self.base or None))
        row = self.catalogue.get(id) if id in judged else None
        # Another base's verdict on the weights holds for this one too, one on the base does not.
        return found.read(None if row is None or row.base_match == "mismatch" else row)

    def _store(self) -> None:
        """Store what has been read."""
        adapters, hub_ids = self._read_now, self._hub_ids
        self._read_now, self._hub_ids = [], {}
        if adapters:
            self.catalogue.add(adapters, hub_ids, base=self.base)

    def _take_in(self, future: Future[Adapter], found: Found, known: Mapping[str, Known]) -> None:
        """Keep an adapter that was read for the next transaction, or note why it was not read."""
        id = found.stub.id
        if future.cancelled():
            self.left.add(id)
            return
        try:
            adapter = future.result()
        except (BudgetSpent, Halted):
            # Nothing is known against an adapter that was not read to the end.
            self.left.add(id)
            self.stopped = True
            return
        except (NetworkError, AccessDenied, NothingMatched, DataError, OSError) as error:
            reason = error.message if isinstance(error, LoraError) else (error.strerror or str(error))
            reason = reason.removeprefix(f"{found.stub.repo}: ")
            self.failures[id] = reason
            # A locked file says nothing about the next one, nor does what failed before.
            own = isinstance(error, DataError | OSError) or _failed_before(found, known)
            self._failed_in_a_row += not own
            down = isinstance(error, Silent) or self._failed_in_a_row >= _MOST_FAILURES_IN_A_ROW
            self.stopped = self.stopped or down
            if id in known:
                return  # the version that is stored can still be used
            adapter = replace(found.stub, status="failed", reason=reason)
        else:
            self._failed_in_a_row = 0
            self.outcomes.add(adapter)
        self._read_now.append(adapter)
        self._hub_ids[id] = found.hub_id


def _failed_before(found: Found, known: Mapping[str, Known]) -> bool:
    return found.stub.id in known and known[found.stub.id].status == "failed"


def _no_skeleton() -> None:
    """The modules of a base that is not known."""
