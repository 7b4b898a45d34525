"""Select by the answers of a pool's adapters to a task."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lora_cli.catalogue.adapters import Catalogue
from lora_cli.errors import NothingMatched
from lora_cli.recipes import SELECTION_METHODS, SelectOptions
from lora_cli.records import Candidates
from lora_cli.selection_methods._trials import Standing, Trials
from lora_cli.steps.pool.select import Scored, enough
from lora_cli.steps.select.stored import merit, ordered
from lora_cli.steps.select.trial import PoolScore, PoolTrial
from lora_cli.text import counted, percent


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What a method of kind "trials" found: the standing and the score of each, by place.

    `asked` is the number of answers that the method asked for, of `of`; an adapter of which it wanted a stored score
    alone gave none. `stored` is the number of scores that were there.
    """

    standings: Mapping[int, Standing]
    scores: Mapping[int, PoolScore]
    asked: int
    of: int
    stored: int

    @property
    def told(self) -> str:
        """The answers in words."""
        saved = self.of - self.asked
        part = f"{self.asked:,} of {counted(self.of, 'answer')} needed, {percent(saved / self.of)} saved"
        there = f"{counted(self.stored, 'score')} in the catalogue already"
        return " · ".join([part if saved else counted(self.of, "answer"), *([there] if self.stored else [])])


def judged(trial: PoolTrial, by: str, names: Sequence[str], enough_of: Callable[[Sequence[int]], int]) -> Judged:
    """The method `by` of kind "trials" run on the adapters `names` (`id@commit`) and the examples of `trial`."""
    stored, counts = trial.known(names), dict[int, int]()
    latest: dict[int, PoolScore] = {}
    n, all_stored = len(trial.examples), len(stored) == len(names)

    def judge(places: Sequence[int], count: int) -> Mapping[int, Standing]:
        count = n if all_stored else count
        found = trial.judge([names[place] for place in places], count)
        by_place = {place: found[names[place]] for place in places if names[place] in found}
        # In a race the answers of the rounds before count too, and the last round's with them.
        counts.update({p: count for p in places if count < n or p in counts or names[p] not in stored})
        latest.update(by_place)
        return {
            place: Standing(count, merit(trial.options.metric, one.value), one.log_likelihood)
            for place, one in by_place.items()
        }

    # What is known on all examples needs no rounds.
    trials = Trials(names=names, examples=1 if all_stored else n, judge=judge, enough=enough_of)
    standings = SELECTION_METHODS.load(by)(trials)
    return Judged(
        standings=standings,
        scores={place: latest[place] for place in standings},
        asked=sum(counts.values()),
        of=len(names) * n,
        stored=len(stored),
    )


def scored_by_trial(
    catalogue: Catalogue,
    trial: PoolTrial,
    options: SelectOptions,
    announce: Callable[[str], None],
    candidates: Candidates,
) -> Scored:
    """The scores of candidates on the task of `trial`; NothingMatched if no candidate can be judged."""
    found = judged(trial, options.by, candidates.pinned, lambda ranked: enough(catalogue, candidates, options, ranked))
    if not found.standings:
        raise NothingMatched("no candidate can be judged on this task", hint="see lora pool verify")
    announce(f"{options.by}: {found.told}")
    n = len(trial.examples)
    return Scored(
        scores={place: one.value for place, one in found.scores.items()},
        order=ordered(found.standings, options, candidates, {}),
        unreadable=trial.failed,
        why={
            place: f"out of the race after {one.examples:,} of {n:,} examples"
            for place, one in found.standings.items()
            if one.examples < n
        },
    )
