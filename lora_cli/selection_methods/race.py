"""Selection by the score on a task, of which most adapters answer a part only."""

from collections.abc import Mapping
from statistics import median

from lora_cli.methods import method
from lora_cli.selection_methods._trials import Standing, Trials

_GLANCE, _START, _TIMES = 5, 10, 2
_FAR, _LEAST = 5.0, 1.0  # robust deviations, and nats per token
_DEVIATION = 0.6745  # the median absolute deviation of a Gaussian of deviation 1


@method("trials")
def race(trials: Trials) -> dict[int, Standing]:
    """Score on a task by successive halving: a round asks the better half twice as many examples.

    All adapters answer the same first 10 examples, the better half of them 20, and so on. Twice as many as are wanted
    go through to all examples, so that the last cut rests on all. After 5 examples those that have collapsed are
    dropped: their expected answers are far less likely than those of the others (a robust z-score below -5, and 1 nat
    per token), and their score is not above the median. An adapter is placed by its last round, then by its score
    there.

    Source: K. Jamieson, A. Talwalkar, arXiv 1502.07943, with paired examples.
    """
    standings = dict(trials.judge(range(len(trials.names)), min(_GLANCE, trials.examples)))
    left, count = _sound(standings), min(_START, trials.examples)
    while True:
        found = trials.judge(left, count)
        for place in left:
            standings.pop(place)
        standings.update(found)
        if count == trials.examples:
            return standings
        ranked = trials.ranked(found)
        kept = max(-(-len(ranked) // 2), 2 * trials.enough(ranked))
        left, count = ranked[:kept], min(_TIMES * count, trials.examples)


def _sound(found: Mapping[int, Standing]) -> list[int]:
    """The places of those that have not collapsed."""
    known = {place: one.log_likelihood for place, one in found.items() if one.log_likelihood is not None}
    if not known:
        return [*found]
    middle, usual = median(known.values()), median(one.merit for one in found.values())
    spread = median(abs(value - middle) for value in known.values()) / _DEVIATION
    far = {place for place, value in known.items() if value < middle - max(_FAR * spread, _LEAST)}
    return [place for place, one in found.items() if place not in far or one.merit > usual]
