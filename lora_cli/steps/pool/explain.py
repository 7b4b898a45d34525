"""Why a selection took what it took: the adapters taken, the next ten, and those that were not in the choice."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypedDict

from lora_cli.catalogue.adapters import Catalogue
from lora_cli.names import unpinned
from lora_cli.recipes import SelectOptions
from lora_cli.text import score

_NEXT = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A choice that was made.

    Places are those of candidates: `pinned` holds `id@commit` of each. `ranked` are the places with a score, the best
    first by `order`, `taken` those that were chosen. `passed` says why a place was passed over, `unreadable` why an id
    has no score; `outside` counts further candidates without one, by what they lack.
    """

    pinned: Sequence[str]
    scores: Mapping[int, float]
    order: Mapping[int, Any]
    ranked: Sequence[int]
    taken: Sequence[int]
    passed: Mapping[int, str]
    unreadable: Mapping[str, str]
    outside: Mapping[str, int]


class Explained(TypedDict):
    """An adapter: its place in the order of scores, from 1, or None without a score; whether it was taken, and why."""

    place: int | None
    id: str
    score: float | None
    taken: bool
    why: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """Those taken, the best ten that were not and those without a score; counts of those outside the choice, by why."""

    rows: Sequence[Explained]
    outside: Mapping[str, int]


def explain(catalogue: Catalogue, options: SelectOptions, base: str | None, choice: Choice) -> Explanation:
    """Why the adapters of a choice were taken or not."""
    taken = {*choice.taken}
    behind = [(at, place) for at, place in enumerate(choice.ranked, 1) if place not in taken]
    shown = [(at, place) for at, place in enumerate(choice.ranked, 1) if place in taken]
    shown += islice(behind, _NEXT)
    rows: list[Explained] = [
        {
            "place": at,
            "id": unpinned(choice.pinned[place]),
            "score": choice.scores[place],
            "taken": place in taken,
            "why": _why(choice, options, at, place, place in taken),
        }
        for at, place in shown
    ]
    for id, reason in choice.unreadable.items():
        rows.append({"place": None, "id": id, "score": None, "taken": False, "why": f"left out: {reason}"})
    outside = {**_outside(catalogue, base, len(choice.pinned)), **choice.outside}
    return Explanation(rows, outside)


def _why(choice: Choice, options: SelectOptions, at: int, place: int, taken: bool) -> str:
    if taken:
        return f"number {at:,} of {len(choice.ranked):,} by {options.by}"
    if place in choice.passed:
        return choice.passed[place]
    last = choice.taken[-1]
    if choice.order[place] == choice.order[last]:
        return "the score of the last one taken; a hash of the names decided"
    if choice.scores[place] == choice.scores[last]:
        return f"the score of the last one taken; --ties {options.ties} decided"
    return f"-k {options.k}: the last one taken has {score(choice.scores[last])}"


def _outside(catalogue: Catalogue, base: str | None, candidates: int) -> dict[str, int]:
    """The adapters of the catalogue that were no candidates, by the first test that they failed."""
    statuses: Mapping[str, int] = catalogue.stats()["by_status"]
    usable = statuses.get("ok", 0)
    of_base = usable if base is None else catalogue.candidates(base=base).bases.get(base, 0)
    found = {status: count for status, count in statuses.items() if status != "ok"}
    found |= {"of another base": usable - of_base, "not fitting --where": of_base - candidates}
    return {why: count for why, count in found.items() if count > 0}
