"""Several systems beside one another: corrected p values, wins and losses, the best one by chance; and what is said."""

from dataclasses import replace

import pytest

from lora_cli.commands.eval import flattery, verdict
from lora_cli.metrics import METRICS
from lora_cli.records import Score
from lora_cli.scores import best_by_chance, paired_difference, sign_test
from lora_cli.steps.evaluate.beside import beside_others

RIGHT = {"base": 4, "a": 18, "b": 10, "c": 4}
"""How many of the first answers each system has right, of 20."""


def scored(values: dict[str, list[float]], *, metric: str = "exact") -> dict[str, Score]:
    """Systems beside one another, with the base as baseline."""
    scores = []
    for name, own in values.items():
        one = Score(system=name, metric=metric, value=sum(own) / len(own), low=0.0, high=1.0, n=len(own))
        if name != "base":
            of = paired_difference(own, values["base"])
            one = replace(one, baseline="base", delta=of.delta, delta_low=of.low, delta_high=of.high, p=of.p)
        scores.append(replace(one, details={"moved": 3}))
    found = beside_others(scores, values, METRICS.get(metric), itself="base")
    return {score.system: score for score in found}


def answers(**right: int) -> dict[str, list[float]]:
    return {name: [1.0] * count + [0.0] * (20 - count) for name, count in right.items()}


def test_the_p_values_are_mcnemars_corrected_by_holm_and_the_pairs_are_counted() -> None:
    found = scored(answers(**RIGHT))
    assert found["base"].p_holm is None
    alone = [sign_test(14, 0), sign_test(6, 0), 1.0]
    assert [found[name].p for name in "abc"] == pytest.approx(alone)
    assert [found[name].p_holm for name in "abc"] == pytest.approx([3 * alone[0], 2 * alone[1], 1.0])
    assert [(found[name].details["wins"], found[name].details["losses"]) for name in "abc"] == [(14, 0), (6, 0), (0, 0)]
    assert found["a"].measurable
    assert not found["b"].measurable, "its p of 0.03 is one of three"
    assert scored(answers(base=4, b=10))["b"].measurable, "alone it is beyond chance"


def test_a_lower_value_wins_where_lower_is_better() -> None:
    found = scored({"base": [2.0, 2.0, 2.0], "a": [1.0, 1.5, 3.0], "b": [2.5, 2.5, 2.0]}, metric="nll")
    assert [(found[name].details["wins"], found[name].details["losses"]) for name in "ab"] == [(2, 1), (0, 2)]
    assert "best_of" in found["a"].details


def test_the_best_adapter_stands_beside_the_best_by_chance() -> None:
    values = answers(**RIGHT)
    found = scored(values)
    chance = best_by_chance([values[name] for name in "abc"], better="higher")
    assert found["a"].details == {
        "moved": 3, "wins": 14, "losses": 0, "best_of": 3, "best_by_chance": chance.expected, "best_p": chance.p,
    }  # fmt: skip
    assert all("best_of" not in found[name].details for name in ("base", "b", "c"))
    assert "best_of" not in scored(answers(base=4, a=18))["a"].details, "one adapter is not chosen among several"


def test_the_verdict_claims_only_what_is_beyond_chance() -> None:
    exact = METRICS.get("exact")
    scores = [*scored(answers(**RIGHT)).values()]
    assert verdict(scores, exact, "base") == (
        "eval: better than base: a · no measurable difference to base: b, c (3 comparisons, p by Holm)"
    )
    assert verdict([*scored(answers(base=4, a=18)).values()], exact, "base") == "eval: better than base: a"
    assert verdict([*scored(answers(base=18, a=4)).values()], exact, "base") == "eval: worse than base: a"
    losses = {"base": [2.0 + k / 100 for k in range(20)], "a": [1.0] * 20}
    assert verdict([*scored(losses, metric="nll").values()], METRICS.get("nll"), "base") == "eval: better than base: a"
    two = {name: own[:2] for name, own in answers(base=0, a=2).items()}
    assert verdict([*scored(two).values()], exact, "base") == "eval: no measurable difference to base: a"
    many = [*scored(answers(base=4, **{f"n{place}": 4 for place in range(9)})).values()]
    assert "base: n0, n1, n2, n3, n4 and 4 more (9 comparisons" in verdict(many, exact, "base")


def test_the_best_of_many_adapters_comes_with_a_note() -> None:
    few = [*scored(answers(**RIGHT)).values()]
    assert [*flattery(few)] == []
    many = scored(answers(base=4, a=18, **{f"n{place}": 4 for place in range(5)}))
    [note] = flattery([*many.values()])
    chance = many["a"].details["best_by_chance"]
    assert note.startswith(
        f"the best of 6 adapters, a, has 0.900; if all were alike, the best would have {chance:.3f} by"
    )
    assert "score it again on other examples" in note
