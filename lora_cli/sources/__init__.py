"""Sources of adapters for a sync. One file is one source: a class of `Source`, and a function of the file's name."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace

from lora_cli.catalogue.adapters import Catalogue
from lora_cli.catalogue.rows import Known
from lora_cli.checks.rules import Rules
from lora_cli.methods import member
from lora_cli.records import Adapter, Progress, silent


@dataclass(frozen=True, slots=True, kw_only=True)
class Sought:
    """The adapters that a sync looks for: those that `rules` judge, at most `limit`, none created before `since`.

    `since` is an ISO time, "" for any; a source that does not know when an adapter was created ignores it. `authors`
    are the only ones to look at, () for all; adapters of more than `max_bytes` are refused. With `copies`, adapters of
    the base's copies under other names are looked for too. `dry_run`: nothing may be stored.
    """

    catalogue: Catalogue
    rules: Rules
    limit: int | None = None
    since: str = ""
    authors: tuple[str, ...] = ()
    max_bytes: int | None = None
    copies: bool = False
    dry_run: bool = False

    @property
    def whole(self) -> bool:
        """Whether every adapter of the source is looked at."""
        return self.limit is None and not self.since and not self.authors


@dataclass(frozen=True)
class Found:
    """An adapter at its source: `stub` holds the facts from the listing, `read` reads the rest.

    `read` gets the stored row, if there is one. It raises NetworkError, AccessDenied, NothingMatched, DataError or
    OSError for failures that may pass.
    """

    stub: Adapter
    is_same: Callable[[Known], bool]
    read: Callable[[Adapter | None], Adapter]
    hub_id: str = ""


class Source(ABC):
    """A place that holds adapters.

    `name` is stored with the sync. `needs_base` is true if the place lists only the adapters of a named base.
    """

    name: str
    needs_base: bool = False

    @abstractmethod
    def batches(self, sought: Sought, progress: Progress) -> Iterator[list[Found]]:
        """All adapters of the source, in batches."""

    @abstractmethod
    def vanished(self, sought: Sought, seen: Collection[str]) -> list[str]:
        """Ids of stored rows from this source that are not in `seen` and no longer at the source."""

    @property
    def traffic(self) -> tuple[int, int]:
        """Requests and bytes so far."""
        return 0, 0

    def stop(self) -> None:  # noqa: B027 - most sources have nothing to stop
        """Cancel the requests that other threads wait for."""


def open_source(name: str, place: str = "", *, budget: int | None = None, progress: Progress = silent) -> Source:
    """The source called `name`, as its file is.

    Args:
        place: the location of the source, "" for its usual one.
        budget: the most requests to send.

    Raises NothingMatched if there is no such place.
    """
    source: Source = member(__name__, name)(place, budget, progress)
    return source


def refuse(stub: Adapter, reason: str, row: Adapter | None) -> Adapter:
    """The `read` of an adapter that is unusable by its listing alone."""
    return replace(stub, status="unusable", reason=reason)
