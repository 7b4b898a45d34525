"""The verdict on studies whose values are given: what it says of a gain, of noise, of too few examples."""

import re

import numpy as np
import pytest

from lora_cli.reports.study_facts import Verdict
from lora_cli.steps.study.verdict import best_recycled, verdict
from tests.reports.study_samples import Key, rows_of


def right(count: int, of: int = 60) -> list[float]:
    return [1.0] * count + [0.0] * (of - count)


def said(values: dict[Key, list[float]], *, better: str = "higher", seeds: int = 3) -> Verdict:
    return verdict(rows_of(values, better=better, seeds=seeds), better=better)


def outcomes(found: Verdict) -> list[str]:
    return [one.outcome for one in found.answers]


def study(fit: int, *, base: int = 20, target: int = 30, noise: int = 25) -> dict[Key, list[float]]:
    return {
        ("base", ""): right(base),
        ("target", ""): right(target),
        ("adaptive", "random"): right(fit),
        ("adaptive", "noise"): right(noise),
    }


def test_a_win_over_all_controls_is_worth_it() -> None:
    found = said(study(55))
    assert outcomes(found) == ["better"] * 3
    assert found.summary.startswith("Recycling is worth it here")
    assert "+0.583" in found.answers[0].found
    assert "Holm's correction for 3 comparisons" in found.answers[0].found


def test_no_difference_is_not_separable_and_says_how_many_examples_would_show_it() -> None:
    found = said(study(22))
    assert outcomes(found)[0] == "open"
    assert found.summary == "Recycling is not shown to help here."
    assert found.answers[0].found.startswith("Not separable: adaptive (random) gains +0.033")
    # Two of 60 pairs differ, by 1: variance 2/60 · 58/60 · 60/59, and 7.849 times it over (2/60)².
    assert "about 232 test examples" in found.answers[0].found
    assert "equal" not in found.answers[0].found


def test_equal_answers_call_for_no_number_of_examples() -> None:
    found = said(study(20, noise=20))
    assert outcomes(found) == ["open", "worse", "open"]
    assert "No number of examples follows" in found.answers[0].found


def test_worse_than_the_base() -> None:
    found = said(study(5))
    assert outcomes(found) == ["worse"] * 3
    assert found.summary == "Recycling does harm here: the base is better."
    assert found.answers[0].follows == "Use the base as it is."


@pytest.mark.parametrize(
    ("values", "summary"),
    [
        (study(45, target=58), "Recycling helps, but a new LoRA on the same data is better."),
        (study(45, target=44), "Recycling helps, but is not shown to be better than a new LoRA on the same data."),
        (study(45, target=20, noise=44), "Recycling helps, but what the adapters hold is not shown to be the reason."),
        (study(45, target=20, noise=58), "Recycling helps, but what the adapters hold is not shown to be the reason."),
    ],
)
def test_the_paper_s_findings_have_their_sentence(values: dict[Key, list[float]], summary: str) -> None:
    assert said(values).summary == summary


def test_too_few_examples_show_nothing_even_if_all_are_won() -> None:
    few: dict[Key, list[float]] = {("base", ""): [0.0] * 5, ("adaptive", "random"): [1.0] * 5}
    found = said(few)
    assert outcomes(found) == ["few", "missing", "missing"]
    assert found.summary == "This study cannot say whether recycling helps."
    assert "5 test examples cannot show a difference" in found.answers[0].found
    assert "; 6 could" in found.answers[0].found
    enough: dict[Key, list[float]] = {("base", ""): [0.0] * 6, ("adaptive", "random"): [1.0] * 6}
    assert outcomes(said(enough))[0] == "better"
    assert outcomes(said({**enough, ("ties", "random"): [0.0] * 6}))[0] == "few"


def test_a_missing_control_leaves_its_question_open() -> None:
    values = study(55)
    del values["target", ""], values["adaptive", "noise"]
    found = said(values)
    assert outcomes(found) == ["better", "missing", "missing"]
    assert "add target to --systems" in found.answers[1].found
    assert "noise to --pools" in found.answers[2].found
    assert "not shown to be better than a new LoRA" in found.summary


def test_without_anything_recycled_there_is_no_verdict() -> None:
    values: dict[Key, list[float]] = {("base", ""): right(20), ("target", ""): right(50)}
    found = said(values)
    assert found.answers == ()
    assert found.summary.startswith("Nothing was recycled")


def test_of_many_equal_systems_the_best_is_no_gain() -> None:
    draw = np.random.default_rng(161)  # chosen so that the best one alone looks like a gain
    values: dict[Key, list[float]] = {("base", ""): draw.integers(0, 2, 40).astype(float).tolist()}
    values |= {(f"merge{i}", "random"): draw.integers(0, 2, 40).astype(float).tolist() for i in range(20)}
    rows = rows_of(values)
    best = best_recycled(rows, "higher")
    assert best is not None
    assert best.value == max(row.value for row in rows)
    assert best.gains["base"].found.p < 0.01
    found = verdict(rows, better="higher")
    assert outcomes(found)[0] == "open"
    assert "best of 20" in found.answers[0].found
    honest = float(re.findall(r"best one gains ([+-][.0-9]+)", found.answers[0].found)[0][:-1])
    assert honest < best.gains["base"].found.delta - 0.05


def test_of_a_loss_less_is_better() -> None:
    draw = np.random.default_rng(1)
    base = draw.normal(3.0, 1.0, 50)
    values: dict[Key, list[float]] = {
        ("base", ""): base.tolist(),
        ("adaptive", "random"): (base - 0.5 + draw.normal(0, 0.1, 50)).tolist(),
        ("ties", "random"): (base + 0.5).tolist(),
    }
    found = said(values, better="lower")
    assert found.answers[0].row == "adaptive (random)"
    assert outcomes(found)[0] == "better"
    assert "gains +0.4" in found.answers[0].found or "gains +0.5" in found.answers[0].found


def test_a_merge_without_noise_leaves_the_question_to_the_best_fit() -> None:
    found = said({**study(50), ("ties", "random"): right(58)})
    assert [one.row for one in found.answers] == ["ties (random)", "ties (random)", "adaptive (random)"]
    assert "ties (random), which scores best, has no such control" in found.answers[2].found
    assert "no such control" not in found.answers[1].found


def test_one_seed_is_said_where_something_is_concluded() -> None:
    assert "rests on one seed" in said(study(55), seeds=1).answers[1].follows
    assert "rests on one seed" not in said(study(55)).answers[1].follows
    assert "rests on one seed" not in said(study(22), seeds=1).answers[0].follows
