"""Select by scores that the catalogue holds already: no model is loaded."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lora_cli.catalogue import scores
from lora_cli.catalogue.scores import StoredScore
from lora_cli.errors import NothingMatched, UsageError
from lora_cli.metrics import METRICS
from lora_cli.names import unpinned
from lora_cli.recipes import SELECTION_METHODS, SelectOptions
from lora_cli.records import Candidates
from lora_cli.selection_methods._trials import Standing, Trials
from lora_cli.steps.pool.select import Scored
from lora_cli.text import counted, in_words, nearest, shortened


def scored_by_stored(
    db: Path, options: SelectOptions, metric: str | None, announce: Callable[[str], None], candidates: Candidates
) -> Scored:
    """The scores of candidates on `options.task`, the newest of each; candidates without one are counted.

    metric: None for the only one by which the task has scores.

    Raises:
        NothingMatched: no such task, or no score of a candidate. UsageError: a metric is missing or unknown.
    """
    task = options.task or ""
    name = _metric(db, task, metric)
    commits = dict(pinned.rpartition("@")[::2] for pinned in candidates.pinned)
    newest = {
        one.id: one
        for one in scores.on_task(db, task, name)
        if one.commit in ("", commits.get(one.id)) and _finite(one)
    }
    found = {place: newest[unpinned(name)] for place, name in enumerate(candidates.pinned) if unpinned(name) in newest}
    if not found:
        raise NothingMatched(f"no candidate has a score on {shortened(task)}", hint="see lora pool sql, adapter_scores")
    without = len(candidates.pinned) - len(found)
    announce(
        f"{shortened(task)}: {counted(len(found), 'score')} by {name}, {better(name)} is better"
        + (f"; {counted(without, 'adapter')} without one left out" if without else "")
    )

    def judge(places: Sequence[int], count: int) -> Mapping[int, Standing]:
        return {
            place: Standing(count, merit(name, found[place].value), found[place].log_likelihood)
            for place in places
            if place in found
        }

    trials = Trials(names=candidates.pinned, examples=1, judge=judge, enough=len)
    standings = SELECTION_METHODS.load(options.by)(trials)
    return Scored(
        scores={place: found[place].value for place in standings},
        order=ordered(standings, options, candidates, {place: one.number for place, one in found.items()}),
        outside={f"without a score on {shortened(task)}": without} if without else {},
    )


def merit(metric: str, value: float) -> float:
    """A score where higher is better, else minus the score."""
    return -value if better(metric) == "lower" else value


def better(metric: str) -> str:
    """Which scores are better, "higher" or "lower"; higher for a metric that is not one of this tool."""
    known = METRICS.methods.get(metric)
    return "higher" if known is None else known.better


def ordered(
    standings: Mapping[int, Standing], options: SelectOptions, candidates: Candidates, numbers: Mapping[int, int]
) -> dict[int, tuple[float, ...]]:
    """The order of `standings`, equal scores as `options.ties` says. `numbers` are those of the scores by age."""
    if options.ties == "likelihood":
        return {place: one.order for place, one in standings.items()}
    if options.ties == "id":
        by_id = sorted(standings, key=lambda place: unpinned(candidates.pinned[place]))
        numbers = {place: number for number, place in enumerate(by_id)}
    return {place: (one.examples, one.merit, -numbers[place]) for place, one in standings.items()}


def _metric(db: Path, task: str, metric: str | None) -> str:
    """The metric that is meant."""
    known = scores.metrics_of(db, task)
    if not known:
        hint = nearest(task, scores.tasks(db), "lora pool import takes scores, lora pool evaluate measures them")
        raise NothingMatched(f"no scores on a task {shortened(task)!r}", hint=hint)
    listed = in_words([shortened(name) for name in known])
    if metric is None and len(known) > 1:
        raise UsageError(f"{shortened(task)} has scores by {listed}", hint="choose one: --metric")
    if metric is not None and metric not in known:
        raise UsageError(f"{shortened(task)} has no scores by {metric}", hint=f"it has some by {listed}")
    return metric or next(iter(known))


def _finite(score: StoredScore) -> bool:
    return math.isfinite(score.value)
