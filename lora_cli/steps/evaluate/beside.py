"""What the scores of several systems mean beside one another: corrected p values, and the best one by chance."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lora_cli.methods import Method
from lora_cli.records import Score
from lora_cli.scores import best_by_chance, holm


def beside_others(
    scores: Sequence[Score], values: Mapping[str, Sequence[float]], metric: Method, *, itself: str, seed: int = 0
) -> list[Score]:
    """The scores with what their number does to them.

    Each difference gets `p_holm`, and in its details `wins` and `losses`: the examples on which the system is better
    or worse than the baseline. Of several adapters, the best gets `best_of` (their number), `best_by_chance` (the score
    of the best if all were alike) and `best_p` (the probability of one at least as good).

    Args:
        values: of each system, its values of the same examples.
        itself: the name of the base, which is no adapter.
    """
    sign = -1 if metric.better == "lower" else 1
    compared = [score for score in scores if score.p is not None]
    corrected = dict(
        zip((score.system for score in compared), holm([score.p or 0.0 for score in compared]), strict=True)
    )
    found = {score.system: dict(score.details) for score in scores}
    for score in compared:
        pairs = [sign * (a - b) for a, b in zip(values[score.system], values[score.baseline], strict=True)]
        found[score.system] |= {"wins": sum(one > 0 for one in pairs), "losses": sum(one < 0 for one in pairs)}
    adapters = [score for score in scores if score.system != itself]
    if len(adapters) > 1:
        best = max(adapters, key=lambda score: sign * score.value)
        chance = best_by_chance([values[score.system] for score in adapters], better=metric.better, seed=seed)
        found[best.system] |= {"best_of": len(adapters), "best_by_chance": chance.expected, "best_p": chance.p}
    return [replace(one, p_holm=corrected.get(one.system), details=found[one.system]) for one in scores]
