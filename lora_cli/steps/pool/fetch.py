"""Download the weights of adapters into the Hub client's cache, and record hash, norm and faults of the weights."""

import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace

from lora_cli.catalogue.adapters import Catalogue
from lora_cli.errors import (
    AccessDenied,
    DataError,
    HeaderError,
    NetworkError,
    NothingMatched,
    OutputError,
    Refused,
    UsageError,
)
from lora_cli.formats.factors import only_saved_whole
from lora_cli.formats.header import read_header
from lora_cli.formats.kinds import CONFIG_NAME, WEIGHTS_NAME
from lora_cli.formats.store import AdapterFiles, locate, read_config
from lora_cli.hub.cache import cache_folder
from lora_cli.hub.client import Hub
from lora_cli.hub.problems import Gated, Silent
from lora_cli.records import USABLE, Adapter, AdapterRef, Progress, silent
from lora_cli.text import counted, size

_THREADS = 4
_SPARE_ROOM = 1.1


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchPlan:
    """Adapters on this machine, adapters to download (`bytes` in all), and unusable adapters with the reason."""

    here: tuple[Adapter, ...]
    missing: tuple[Adapter, ...]
    refused: tuple[tuple[Adapter, str], ...]
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchReport:
    """The outcome for each adapter: `fetched` were downloaded, `here` were present, `failed` are worth another try."""

    fetched: tuple[Adapter, ...]
    here: tuple[Adapter, ...]
    refused: tuple[tuple[Adapter, str], ...]
    failed: tuple[tuple[Adapter, str], ...]
    bytes: int


def plan(catalogue: Catalogue, refs: Sequence[AdapterRef], *, force: bool = False, whole: bool = False) -> FetchPlan:
    """Which of `refs` still have to be downloaded or checked. Sends nothing.

    whole: also fetch adapters that hold modules saved whole beside their update.
    NothingMatched for a reference that is not in the catalogue.
    """
    here, missing, refused = [], [], []
    size = 0
    for ref in refs:
        row = catalogue.get(ref.id)
        adapter = (
            row if row.commit == ref.commit else replace(row, commit=ref.commit, sha256="", norm=None, status="ok")
        )
        if adapter.status in ("unusable", "gone", "failed") and not _will_do(adapter, whole=whole):
            refused.append((adapter, adapter.reason))
        elif (absent := locate(ref) is None) and adapter.source == "folder":
            refused.append((adapter, "its folder is gone"))
        elif not (force or absent) and _will_do(adapter, whole=whole) and adapter.sha256:
            here.append(adapter)
        else:
            missing.append(adapter)
            size += adapter.bytes if absent else 0
    return FetchPlan(here=tuple(here), missing=tuple(missing), refused=tuple(refused), bytes=size)


def fetch(
    catalogue: Catalogue, todo: FetchPlan, hub: Hub, *, whole: bool = False, progress: Progress = silent
) -> FetchReport:
    """Download the missing weights of a plan, check every byte, and write hash, norm and status into the catalogue.

    Adapters in folders are checked in place. What the Hub refuses is no verdict on an adapter, except that it is gated.
    Raises OutputError if the disk has no room; faults of single adapters are in the report.
    """
    _room_for(todo.bytes)
    fetched: list[Adapter] = []
    here = list(todo.here)
    refused = list(todo.refused)
    failed: list[tuple[Adapter, str]] = []
    with ThreadPoolExecutor(_THREADS) as pool:
        pending: dict[Future[tuple[Adapter, bool]], Adapter] = {
            pool.submit(_bring, hub, adapter): adapter for adapter in todo.missing
        }
        progress("fetching adapters", 0, len(pending))
        try:
            for done, future in enumerate(as_completed(pending), 1):
                before = pending[future]
                try:
                    adapter, downloaded = future.result()
                except (NetworkError, AccessDenied, NothingMatched, UsageError, DataError) as error:
                    failed.append((before, error.message))
                    if isinstance(error, Silent):
                        hub.stop()  # the others would wait as long, a few at a time
                else:
                    catalogue.learn(adapter)
                    if not _will_do(adapter, whole=whole):
                        refused.append((adapter, adapter.reason))
                    else:
                        (fetched if downloaded else here).append(adapter)
                progress("fetching adapters", done, len(pending))
        except BaseException:
            hub.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return FetchReport(
        fetched=tuple(fetched),
        here=tuple(here),
        refused=tuple(refused),
        failed=tuple(failed),
        bytes=sum(adapter.bytes for adapter in fetched),
    )


def bring(
    catalogue: Catalogue,
    refs: Sequence[AdapterRef],
    announce: Callable[[str], None],
    progress: Progress = silent,
    *,
    whole: bool = False,
) -> None:
    """Fetch and check the weights of catalogued adapters that are not on this machine yet.

    whole: also accept adapters that hold modules saved whole beside their update.

    Raises:
        Refused, AccessDenied: weights that turned out to be unusable, or a gated repository.
        NetworkError: some could not be fetched; the others are kept.
    """
    for adapter, reason in refused(catalogue, refs, announce, progress, whole=whole):
        kind = AccessDenied if adapter.status == "gated" else Refused
        raise kind(f"{adapter.id}: {reason}", hint="leave this adapter out")


def refused(
    catalogue: Catalogue,
    refs: Sequence[AdapterRef],
    announce: Callable[[str], None],
    progress: Progress = silent,
    *,
    whole: bool = False,
) -> tuple[tuple[Adapter, str], ...]:
    """As `bring`, but returns unusable adapters with the reason instead of raising."""
    missing = [ref for ref in refs if locate(ref) is None]
    if not missing:
        return ()
    todo = plan(catalogue, missing, whole=whole)
    announce(f"fetching {counted(len(missing), 'adapter')}, {size(todo.bytes)}")
    report = fetch(catalogue, todo, Hub(progress=progress), whole=whole, progress=progress)
    for adapter, reason in report.failed:
        raise NetworkError(f"{adapter.id}: {reason}", hint="rerun to fetch the rest")
    return report.refused


def _will_do(adapter: Adapter, *, whole: bool) -> bool:
    return adapter.status in USABLE or (whole and only_saved_whole(adapter.reason))


def _bring(hub: Hub, adapter: Adapter) -> tuple[Adapter, bool]:
    """The adapter with hash, norm and status from its weights, and True if they had to be downloaded."""
    files = locate(adapter.ref)
    downloaded = files is None
    try:
        if files is None or (adapter.source == "hub" and not adapter.sha256):
            files = download(hub, adapter)
    except Gated as error:
        return replace(adapter, status="gated", reason=error.message), False
    try:
        header = read_header(files.weights)
    except HeaderError as error:
        return replace(adapter, status="unusable", reason=error.message), downloaded
    if not only_saved_whole(adapter.reason):
        adapter = replace(adapter, status="ok", reason="")
    adapter = replace(adapter, bytes=header.file_size)
    from lora_cli.checks.weights import weighed

    return weighed(adapter, files.weights, header, read_config(files.config.parent) or b""), downloaded


def download(hub: Hub, adapter: Adapter) -> AdapterFiles:
    """The adapter's two files in the Hub client's cache, their bytes checked. Raises the errors of the Hub."""
    prefix = f"{adapter.subfolder}/" if adapter.subfolder else ""
    config = hub.download(adapter.repo, prefix + CONFIG_NAME, adapter.commit)
    return AdapterFiles(adapter.ref, config, hub.download(adapter.repo, prefix + WEIGHTS_NAME, adapter.commit))


def _room_for(wanted: int) -> None:
    folder = cache_folder()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if wanted * _SPARE_ROOM > free:
        raise OutputError(
            f"{size(wanted)} to fetch, {size(free)} free in {cache_folder()}",
            hint="free some space, or set HF_HOME to another disk",
        )
