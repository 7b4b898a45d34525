"""Choose adapters from the catalogue."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from inspect import signature
from itertools import chain, groupby, islice
from typing import Any

from lora_cli.catalogue.adapters import Catalogue
from lora_cli.errors import NothingMatched, UsageError
from lora_cli.names import unpinned
from lora_cli.recipes import SELECTION_METHODS, SelectOptions
from lora_cli.records import AdapterRow, Candidates, Progress, silent
from lora_cli.settings import Settings
from lora_cli.steps.pool.dedupe import Copies
from lora_cli.steps.pool.explain import Choice, Explanation, explain

_BASES_NAMED = 5


def select(
    catalogue: Catalogue,
    options: SelectOptions,
    *,
    base: str | None,
    seed: int,
    announce: Callable[[str], None],
    progress: Progress = silent,
    explained: Callable[[Explanation], None] | None = None,
) -> list[tuple[AdapterRow, float]]:
    """The best usable adapters by a selection method, best first, each with its score.

    Equal scores are ordered by a hash of the adapter's name, so that neither the alphabet nor the order of a sync
    matters.

    Args:
        base: the base model of the adapters; None if the catalogue has only one.
        seed: the seed of methods that draw.
        announce: called with the number of adapters and bytes before a download, and with each adapter that is left
            out because its weights cannot be read.
        explained: called with why adapters were taken or not.

    Raises:
        UsageError: an unknown method, a bad condition, a target missing, or no base where there are several.
        NothingMatched: no usable adapter fits.
        LoraError: the target cannot be read.
    """
    method, target = SELECTION_METHODS.get(options.by), options.target
    if (target is None) == (method.kind == "weights"):
        raise UsageError(f"--by {options.by} " + ("needs --target" if target is None else "takes no --target"))
    asked = _columns(options.by) if method.kind == "catalogue" else []
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
    unreadable: dict[str, str] = {}
    if method.kind == "weights":
        from lora_cli.steps.pool.by_weights import scored_by_weights

        assert target is not None
        function = SELECTION_METHODS.load(options.by)
        scores, unreadable = scored_by_weights(catalogue, function, candidates, target, announce, progress)
    else:
        function = SELECTION_METHODS.load(options.by)
        given = {"pinned": candidates.pinned, "seed": seed, **candidates.facts}
        scores = dict(enumerate(function(**{name: given[name] for name in asked})))
    copies = None if options.dedupe is None else Copies(catalogue, options.dedupe)
    chosen, passed = _best(candidates, _ranked(candidates, scores), options, copies)
    if copies is not None:
        announce(copies.told())
    if explained is not None:
        ranked = [*_ranked(candidates, scores)]
        choice = Choice(
            pinned=candidates.pinned, scores=scores, ranked=ranked, taken=chosen, passed=passed, unreadable=unreadable
        )
        explained(explain(catalogue, options, base, choice))
    rows = catalogue.rows([unpinned(candidates.pinned[place]) for place in chosen], base=base)
    return list(zip(rows, (scores[place] for place in chosen), strict=True))


def select_and_remember(
    catalogue: Catalogue,
    settings: Settings,
    options: SelectOptions,
    *,
    name: str = "",
    announce: Callable[[str], None],
    progress: Progress = silent,
    explained: Callable[[Explanation], None] | None = None,
) -> tuple[list[tuple[AdapterRow, float]], dict[str, Any]]:
    """`select` for the base and the seed of the settings, kept as the last selection, also by `name`; and its settings.

    Raises:
        NothingMatched: no adapter fits. Else as `select` does.
    """
    chosen = select(
        catalogue,
        options,
        base=settings.base,
        seed=settings.seed,
        announce=announce,
        progress=progress,
        explained=explained,
    )
    if not chosen:
        raise NothingMatched("no adapter fits")
    asked = {
        "k": options.k,
        "base": settings.base,
        "where": [*options.where],
        "seed": settings.seed,
        "max_per_author": options.max_per_author,
        "dedupe": options.dedupe,
        "target": str(options.target.resolve()) if options.target else None,
    }
    catalogue.selections.remember(name, chosen, options.by, asked)
    return chosen, asked


def demand_one_base(counts: Mapping[str, int]) -> None:
    """UsageError where adapters are for several base models. `counts` has the adapters of each."""
    if len(counts) > 1:
        named = ", ".join(f"{name} ({count:,})" for name, count in [*counts.items()][:_BASES_NAMED])
        more = f" and {len(counts) - _BASES_NAMED:,} more" if len(counts) > _BASES_NAMED else ""
        raise UsageError(
            f"the usable adapters are for {len(counts):,} base models: {named}{more}",
            hint="choose one: --base NAME, LORA_BASE, or base in lora.toml",
        )


def _columns(by: str) -> list[str]:
    """What a method of kind `catalogue` reads, by the names of its parameters: columns, "pinned", "seed"."""
    return [*signature(SELECTION_METHODS.load(by)).parameters]


def _ranked(candidates: Candidates, scores: Mapping[int, float]) -> Iterator[int]:
    """The places with a score, the best first, equal scores in the order of a hash."""
    groups = groupby(sorted(scores, key=scores.__getitem__, reverse=True), scores.__getitem__)
    return chain.from_iterable(sorted(equal, key=lambda i: _hashed(candidates.pinned[i])) for _, equal in groups)


def _best(
    candidates: Candidates, ranked: Iterator[int], options: SelectOptions, copies: Copies | None
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


def _hashed(pinned: str) -> str:
    return hashlib.sha256(pinned.encode()).hexdigest()
