"""Choose adapters from the catalogue."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_cli.catalogue.adapters import Catalogue
from lora_cli.errors import LoraError, NothingMatched, Refused, UsageError
from lora_cli.formats.store import folder_ref, locate
from lora_cli.recipes import SELECTION_METHODS, SelectOptions
from lora_cli.records import AdapterRow, Candidate, Progress, silent
from lora_cli.settings import Settings
from lora_cli.steps.pool.fetch import refused
from lora_cli.steps.pool.lookup import demand_one_base

if TYPE_CHECKING:
    from lora_cli.formats.reader import OpenAdapter


def select(
    catalogue: Catalogue,
    options: SelectOptions,
    *,
    base: str | None,
    seed: int,
    announce: Callable[[str], None],
    progress: Progress = silent,
) -> list[tuple[AdapterRow, float]]:
    """The best usable adapters by a selection method, best first, each with its score.

    Equal scores are ordered by a hash of the adapter's name, so that neither the alphabet nor the order of a sync
    matters.

    Args:
        base: the base model of the adapters; None if the catalogue has only one.
        seed: the seed of methods that draw.
        announce: called with the number of adapters and bytes before a download, and with each adapter that is left
            out because its weights cannot be read.

    Raises:
        UsageError: an unknown method, a bad condition, a target missing, or no base where there are several.
        NothingMatched: no usable adapter fits.
        LoraError: the target cannot be read.
    """
    method, target = SELECTION_METHODS.get(options.by), options.target
    if (target is None) == (method.kind == "weights"):
        raise UsageError(f"--by {options.by} " + ("needs --target" if target is None else "takes no --target"))
    candidates = catalogue.candidates(options.where, base=base)
    demand_one_base(candidates)
    if not candidates:
        raise NothingMatched(
            f"no usable adapter of {base}" if base and not options.where else "no usable adapter fits these conditions",
            hint="see lora pool list, or run lora pool sync",
        )
    if method.kind == "weights":
        assert target is not None
        scored = _by_weights(catalogue, SELECTION_METHODS.load(options.by), candidates, target, announce, progress)
    else:
        scored = list(zip(candidates, SELECTION_METHODS.load(options.by)(candidates, seed), strict=True))
    chosen = _best(scored, options.k, options.max_per_author)
    rows = catalogue.rows([candidate.id for candidate, _ in chosen])
    return list(zip(rows, (score for _, score in chosen), strict=True))


def select_and_remember(
    catalogue: Catalogue,
    settings: Settings,
    options: SelectOptions,
    *,
    name: str = "",
    announce: Callable[[str], None],
    progress: Progress = silent,
) -> tuple[list[tuple[AdapterRow, float]], dict[str, Any]]:
    """`select` for the base and the seed of the settings, kept as the last selection, also by `name`; and its settings.

    Raises:
        NothingMatched: no adapter fits. Else as `select` does.
    """
    chosen = select(catalogue, options, base=settings.base, seed=settings.seed, announce=announce, progress=progress)
    if not chosen:
        raise NothingMatched("no adapter fits")
    asked = {
        "k": options.k,
        "base": settings.base,
        "where": [*options.where],
        "seed": settings.seed,
        "max_per_author": options.max_per_author,
        "target": str(options.target.resolve()) if options.target else None,
    }
    catalogue.selections.remember(name, chosen, options.by, asked)
    return chosen, asked


def _best(
    scored: Sequence[tuple[Candidate, float]], k: int, max_per_author: int | None
) -> list[tuple[Candidate, float]]:
    """The k best, equal scores in the order of a hash, of each author no more than `max_per_author`."""
    groups = groupby(sorted(scored, key=itemgetter(1), reverse=True), itemgetter(1))
    ranked = chain.from_iterable(sorted(equal, key=lambda pair: _hashed(pair[0])) for _, equal in groups)
    chosen: list[tuple[Candidate, float]] = []
    taken: Counter[str] = Counter()
    for candidate, score in ranked:
        if len(chosen) == k:
            break
        if max_per_author is not None and candidate.author and taken[candidate.author] >= max_per_author:
            continue
        taken[candidate.author] += 1
        chosen.append((candidate, score))
    return chosen


def _hashed(candidate: Candidate) -> str:
    return hashlib.sha256(candidate.pinned.encode()).hexdigest()


def _by_weights(
    catalogue: Catalogue,
    function: Callable[..., list[float]],
    candidates: Sequence[Candidate],
    target: Path,
    announce: Callable[[str], None],
    progress: Progress,
) -> list[tuple[Candidate, float]]:
    """Each candidate whose weights can be read with its score. NothingMatched where there is none."""
    goal = _target(target)
    function([], goal)  # fail on a faulty target before any candidate is blamed
    rows = {row.id: row for row in catalogue.rows([candidate.id for candidate in candidates])}
    unfit = {row.id: reason for row, reason in refused(catalogue, [r.ref for r in rows.values()], announce, progress)}
    for id, reason in unfit.items():
        announce(f"{id} left out: {reason}")
    scores = _scored(function, [row for row in rows.values() if row.id not in unfit], goal, announce)
    if not scores:
        raise NothingMatched("no adapter whose weights can be read fits", hint="see lora pool verify")
    return [(candidate, scores[candidate.id]) for candidate in candidates if candidate.id in scores]


def _scored(
    function: Callable[..., list[float]],
    rows: Sequence[AdapterRow],
    target: "OpenAdapter",
    announce: Callable[[str], None],
) -> dict[str, float]:
    """Id → score, without adapters that cannot be read."""
    try:
        scores = function([_opened(row) for row in rows], target)
        return {row.id: score for row, score in zip(rows, scores, strict=True)}
    except LoraError as error:
        if len(rows) == 1:
            announce(f"{rows[0].id} left out: {error.message.removeprefix(f'{rows[0].id}: ')}")
            return {}
    half = len(rows) // 2
    return _scored(function, rows[:half], target, announce) | _scored(function, rows[half:], target, announce)


def _opened(row: AdapterRow) -> "OpenAdapter":
    from lora_cli.formats.reader import open_adapter

    files = locate(row.ref)
    if files is None:
        raise Refused(f"{row.id}: its files are no longer there")
    return open_adapter(files)


def _target(folder: Path) -> "OpenAdapter":
    from lora_cli.formats.reader import open_adapter

    files = locate(folder_ref(folder))
    if files is None:
        raise NothingMatched(
            f"{folder}: no adapter in this folder", hint="give the folder of a LoRA, as train writes it"
        )
    return open_adapter(files)
