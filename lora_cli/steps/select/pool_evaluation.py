"""Evaluate the adapters of a pool: which ones, and the best of them."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from lora_cli.catalogue.adapters import Catalogue
from lora_cli.errors import NothingMatched, Refused, UsageError
from lora_cli.names import unpinned
from lora_cli.selection_methods._trials import best_first
from lora_cli.steps.bases import demand_one_base
from lora_cli.steps.select.by_trial import Judged, judged
from lora_cli.steps.select.trial import PoolScore, PoolTrial


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolEvaluated:
    """The adapters of an evaluation, by id, the best first; the last of a race have answered a part of the examples."""

    scores: dict[str, PoolScore]
    found: Judged


def adapters_of(
    catalogue: Catalogue,
    *,
    base: str | None,
    where: Sequence[str] = (),
    selection: str | None = None,
    sample: int | None = None,
    seed: int = 0,
) -> list[str]:
    """The adapters to evaluate, as `id@commit`: the usable ones, those of a selection, or a sample of either.

    Raises:
        UsageError: conditions beside a selection, or adapters of several bases. NothingMatched: none fits.
    """
    if selection is not None:
        if where:
            raise UsageError("--selection and --where exclude each other")
        found = catalogue.selections.last(selection)
        if found is None:
            raise NothingMatched(f"no selection called {selection!r}", hint="see lora pool selections")
        names = sorted(ref.pinned for ref in found.refs)
    else:
        candidates = catalogue.candidates(where=where, base=base)
        demand_one_base(candidates.bases)
        names = [*candidates.pinned]
    if not names:
        raise NothingMatched("no usable adapter fits", hint="see lora pool list, or run lora pool sync")
    return names if sample is None or sample >= len(names) else sorted(random.Random(seed).sample(names, sample))


def evaluate_pool(trial: PoolTrial, names: Sequence[str], *, k: int, race: bool = False) -> PoolEvaluated:
    """Score the adapters `names` (`id@commit`) on all examples of a trial, or race them for the best `k`.

    Raises:
        Refused: no adapter can be judged. Else as `PoolTrial.judge` does.
    """
    found = judged(trial, "race" if race else "evaluation", names, partial(_first, k))
    if not found.standings:
        raise Refused("no adapter can be judged on this task", hint="lora pool verify says what is wrong with each")
    ranked = best_first({place: one.order for place, one in found.standings.items()}, names)
    return PoolEvaluated(scores={unpinned(names[place]): found.scores[place] for place in ranked}, found=found)


def _first(k: int, ranked: Sequence[int]) -> int:
    return min(k, len(ranked))
