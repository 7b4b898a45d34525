"""Choose adapters from the catalogue."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from itertools import islice
from typing import Any

from lora_cli.catalogue.adapters import Catalogue
from lora_cli.errors import NothingMatched
from lora_cli.names import unpinned
from lora_cli.recipes import SELECTION_METHODS, SelectOptions
from lora_cli.records import AdapterRow, Candidates
from lora_cli.selection_methods._trials import best_first
from lora_cli.steps.bases import demand_one_base
from lora_cli.steps.pool.dedupe import Copies
from lora_cli.steps.pool.explain import Choice, Explanation, explain


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """The scores of candidates by place, and the order that they make.

    `order` is the scores themselves where it is empty; the greater value comes first, equal ones by a hash of the name.
    `unreadable` says why an adapter, by id, has no score; `why` why a place is where it is; `outside` counts candidates
    without a score, by what they lack.
    """

    scores: Mapping[int, float]
    order: Mapping[int, Any] = field(default_factory=dict)
    unreadable: Mapping[str, str] = field(default_factory=dict)
    why: Mapping[int, str] = field(default_factory=dict)
    outside: Mapping[str, int] = field(default_factory=dict)


Scorer = Callable[[Candidates], Scored]


def select(
    catalogue: Catalogue,
    options: SelectOptions,
    *,
    base: str | None,
    seed: int,
    announce: Callable[[str], None],
    scorer: Scorer | None = None,
    explained: Callable[[Explanation], None] | None = None,
) -> list[tuple[AdapterRow, float]]:
    """The best usable adapters by a selection method, best first, each with its score.

    Equal scores are ordered by a hash of the adapter's name, so that neither the alphabet nor the order of a sync
    matters.

    Args:
        base: the base model of the adapters; None if the catalogue has only one.
        seed: the seed of methods that draw.
        announce: called with what a user should know about the choice.
        scorer: the scores of a method that reads more than the catalogue; None for one of kind "catalogue".
        explained: called with why adapters were taken or not.

    Raises:
        UsageError: an unknown method, a bad condition, or no base where there are several.
        NothingMatched: no usable adapter fits. Else as `scorer` raises.
    """
    asked = _columns(options.by) if scorer is None else []
    read = [name for name in asked if name not in ("pinned", "seed")]
    read += ["author"] if options.max_per_author is not None else []
    read += ["sha256", "hub_sha256"] if options.dedupe is not None else []
    candidates = catalogue.candidates(read, options.where, base=base)
    demand_one_base(candidates.bases)
    if not candidates.pinned:
        raise NothingMatched(
            f"no usable adapter of {base}" if base and not options.where else "no usable adapter fits these conditions",
            hint="see lora pool list, or run lora pool sync",
        )
    if scorer is None:
        given = {"pinned": candidates.pinned, "seed": seed, **candidates.facts}
        found = SELECTION_METHODS.load(options.by)(**{name: given[name] for name in asked})
        scored = Scored(scores=dict(enumerate(found)))
    else:
        scored = scorer(candidates)
    copies = None if options.dedupe is None else Copies(catalogue, options.dedupe)
    order = scored.order or scored.scores
    chosen, passed = _best(candidates, best_first(order, candidates.pinned), options, copies)
    if copies is not None:
        announce(copies.told())
    if explained is not None:
        choice = Choice(
            pinned=candidates.pinned,
            scores=scored.scores,
            order=order,
            ranked=[*best_first(order, candidates.pinned)],
            taken=chosen,
            passed={**scored.why, **passed},
            unreadable=scored.unreadable,
            outside=scored.outside,
        )
        explained(explain(catalogue, options, base, choice))
    rows = catalogue.rows([unpinned(candidates.pinned[place]) for place in chosen], base=base)
    return list(zip(rows, (scored.scores[place] for place in chosen), strict=True))


def enough(catalogue: Catalogue, candidates: Candidates, options: SelectOptions, ranked: Sequence[int]) -> int:
    """How many of the first of a ranking hold all adapters that these options take from it."""
    copies = None if options.dedupe is None else Copies(catalogue, options.dedupe)
    chosen, _ = _best(candidates, ranked, options, copies)
    return ranked.index(chosen[-1]) + 1 if len(chosen) == options.k else len(ranked)


def _columns(by: str) -> list[str]:
    """What a method of kind `catalogue` reads, by the names of its parameters: columns, "pinned", "seed"."""
    return [*signature(SELECTION_METHODS.load(by)).parameters]


def _best(
    candidates: Candidates, ranked: Iterable[int], options: SelectOptions, copies: Copies | None
) -> tuple[list[int], dict[int, str]]:
    """The first k of `ranked` without copies and within the limit of each author; and why others were passed over."""
    most = options.max_per_author
    if most is None and copies is None:
        return [*islice(ranked, options.k)], {}
    authors = candidates.facts.get("author", ())
    chosen: list[int] = []
    passed: dict[int, str] = {}
    taken: Counter[str] = Counter()
    for place in ranked:
        if len(chosen) == options.k:
            break
        author = authors[place] if authors else ""
        if author and most is not None and taken[author] >= most:
            passed[place] = f"--max-per-author {most}: better ones of this author were taken"
            continue
        facts = candidates.facts
        if copies is not None and not copies.spare(
            candidates.pinned[place], facts["sha256"][place] or facts["hub_sha256"][place]
        ):
            passed[place] = f"--dedupe {options.dedupe:g}: a copy of a better one"
            continue
        taken[author] += 1
        chosen.append(place)
    return chosen, passed
