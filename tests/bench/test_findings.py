"""The numbers of docs/findings.md: how their intervals are made, and that tests were never trained on."""

import numpy as np
import pytest

from lora_cli.scores import paired_difference
from tests.bench.findings import LEARNT, STORY_ADAPTERS, STORY_TASKS, TESTED
from tests.bench.findings_tables import POWER, gain, level
from tests.bench.made_stories import prompts, story_examples


def test_with_one_seed_the_interval_is_that_of_a_paired_bootstrap() -> None:
    rng = np.random.default_rng(1)
    ours, theirs = rng.normal(0.3, 1, (1, 400)), rng.normal(0, 1, (1, 400))
    found, expected = gain(ours, theirs), paired_difference([*ours[0]], [*theirs[0]])
    assert found.mean == pytest.approx(expected.delta)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.02)
    error = float(np.std(ours - theirs)) / np.sqrt(400)
    assert found.seen == pytest.approx(POWER * error, rel=0.05)
    assert (found.won, found.seeds) == (1, 1)


def test_seeds_that_differ_widen_the_interval_and_lower_is_better_turns_it() -> None:
    ours = np.repeat([[1.0], [2.0], [3.0], [4.0], [-1.0]], 300, axis=1)
    found, turned = gain(ours, np.zeros((1, 300))), gain(ours, np.zeros((1, 300)), -1)
    assert (found.mean, found.won, found.seeds) == (pytest.approx(1.8), 4, 5)
    assert found.low < 0.6
    assert found.high > 3.0
    assert (turned.mean, turned.won) == (pytest.approx(-1.8), 1)
    assert level(ours)[1:] == pytest.approx((found.low, found.high))


def test_no_story_is_tested_that_was_trained_on() -> None:
    assert [task in STORY_ADAPTERS for task in STORY_TASKS] == [True, False], "with and without a relevant adapter"
    for form, theme in STORY_TASKS:
        found = story_examples(form, theme, LEARNT + TESTED, "findings")
        assert len(prompts(found)) == LEARNT + TESTED
        seen = story_examples(form, theme, 300, "adapter", prompts(found))
        assert len(seen) == 300
        assert not prompts(seen) & prompts(found)
