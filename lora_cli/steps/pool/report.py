"""A catalogue in numbers: what a report of it shows."""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from lora_cli.catalogue.adapters import Catalogue
from lora_cli.errors import NothingMatched
from lora_cli.records import PoolReport, ReportedAdapter, Share
from lora_cli.steps.pool.sketched import map_of

_MOST = 12
_MONTHS = 24
_MONTH = re.compile(r"\d{4}-(?:0[1-9]|1[0-2])", re.ASCII)
_SIZES = {
    1_000_000: "below 1 MB",
    3_000_000: "1 to 3 MB",
    10_000_000: "3 to 10 MB",
    30_000_000: "10 to 30 MB",
    100_000_000: "30 to 100 MB",
    300_000_000: "100 to 300 MB",
    1_000_000_000: "300 MB to 1 GB",
    math.inf: "1 GB and more",
}
"""Classes of sizes, by the bytes that are too many for them."""
_WORD = re.compile(r"'[^']*'|\d[\d,]*\d|[^\s,;:()']+")
_OWN = re.compile(r"['/\d]")


def pool_report(catalogue: Catalogue, where: Sequence[str] = (), *, base: str | None = None) -> PoolReport:
    """The report of the adapters for which every condition of `where` holds, as judged for `base`, None for all.

    NothingMatched if there are none.
    """
    adapters = catalogue.reported(where, base=base)
    if not adapters:
        nothing = "no adapter" + (" fits these conditions" if where else " is known")
        raise NothingMatched(nothing, hint="lora pool list shows all, lora pool sync looks for more")
    return PoolReport(
        adapters=adapters,
        total=Share("", len(adapters), sum(map(_usable, adapters))),
        counts={
            "Status": _shares(adapters, lambda row: row.status),
            "Reason": _shares([row for row in adapters if row.reason], lambda row: kind_of_reason(row.reason)),
            "Base model": _shares(adapters, lambda row: row.base),
            "Rank": _shares(adapters, lambda row: row.rank, lambda every: sorted(_commonest(every))),
            "Created": _shares(adapters, _month, _latest, rest="before"),
            "Licence": _shares(adapters, lambda row: row.licence),
            "Size": _shares(adapters, _size_class, sorted, words=_SIZES.__getitem__),
            "Data type": _shares(adapters, lambda row: row.dtype),
            "Author": _shares(adapters, lambda row: row.author),
        },
        authors=len({row.author for row in adapters} - {""}),
        bytes=sum(row.bytes for row in adapters),
        last_sync=catalogue.last_sync(),
        conditions=tuple(where),
        map=map_of(catalogue, adapters),
    )


def _usable(row: ReportedAdapter) -> bool:
    return row.status == "ok"


def _commonest(every: Counter[Any]) -> list[Any]:
    return sorted(every, key=lambda one: (-every[one], one))[:_MOST]


def _latest(every: Counter[Any]) -> list[Any]:
    return sorted(every)[-_MONTHS:]


def _shares(
    adapters: Sequence[ReportedAdapter],
    key: Callable[[ReportedAdapter], Any],
    order: Callable[[Counter[Any]], list[Any]] = _commonest,
    *,
    words: Callable[[Any], str] = str,
    rest: str = "other ones",
) -> list[Share]:
    """The numbers of adapters by their keys: those that `order` chooses, the rest, and what is not known."""
    every, usable = Counter(map(key, adapters)), Counter(map(key, filter(_usable, adapters)))
    known = Counter({one: count for one, count in every.items() if one})
    chosen = order(known)
    shares = [Share(words(one), every[one], usable[one]) for one in chosen]
    if left := known.keys() - set(chosen):
        shares.append(Share(rest, sum(every[one] for one in left), sum(usable[one] for one in left), rest=True))
    if unknown := every - known:
        shares.append(Share("not known", unknown.total(), sum(usable[one] for one in unknown)))
    return shares


def kind_of_reason(reason: str) -> str:
    """A reason without what is the adapter's own in it: quoted text, and words with a digit or a slash."""
    return _WORD.sub(lambda word: "…" if _OWN.search(word[0]) else word[0], reason)


def _month(row: ReportedAdapter) -> str:
    found = _MONTH.match(row.created_at)
    return found[0] if found else ""


def _size_class(row: ReportedAdapter) -> float:
    return next(bound for bound in _SIZES if row.bytes < bound) if row.bytes else 0
