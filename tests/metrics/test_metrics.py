"""The laws of the folder of metrics: each one's values and interval beside a plain reference that shares no code."""

import json
import math
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_cli import metrics
from lora_cli.errors import DataError, UsageError
from lora_cli.metrics import METRICS
from lora_cli.models.base_model import BaseModel
from lora_cli.recipes import EvalOptions
from lora_cli.records import Example
from lora_cli.scores import interval
from lora_cli.steps.evaluate.evaluate import System, evaluate
from lora_cli.world import World
from tests.cli import ok
from tests.generate import metrics as page
from tests.tiny_bases import examples, llama


class Law(NamedTuple):
    """One metric by hand: the value of one example, and a better and a worse example, each as the metric gets it."""

    value: Callable[..., float]
    better: tuple[Any, ...]
    worse: tuple[Any, ...]


def exact_by_hand(output: str, expected: str) -> float:
    def kept(text: str) -> str:
        text = re.sub(r"\A.*####", "", text, flags=re.DOTALL)
        text = re.sub(r"\A\s+|\s+\Z", "", text.translate({ord(" "): None}))
        return re.sub(r"\A\.+|\.+\Z", "", text).casefold()

    return 1.0 if kept(output) == kept(expected) else 0.0


def choice_by_hand(sums: Sequence[float], tokens: Sequence[int], texts: Sequence[str]) -> float:
    """Whether the first option is ahead of each other one."""
    return float(all(sums[0] - other > 1e-6 * max(1.0, -max(sums)) for other in sums[1:]))


LAWS = {
    "choice": Law(choice_by_hand, ([-1.0, -2.0], [1, 1], ["a", "b"]), ([-2.0, -1.0], [1, 1], ["a", "b"])),
    "exact": Law(exact_by_hand, ("#### 4 2.", "42"), ("43", "42")),
    "nll": Law(lambda log_likelihood: 0.0 - log_likelihood, (-0.5,), (-2.0,)),
}
INPUTS = {
    "output": st.tuples(*[st.text("#. aA1\n\t", max_size=12)] * 2),
    "likelihood": st.tuples(st.floats(-50, 0)),
    "choice": st.integers(2, 4).flatmap(
        lambda n: st.tuples(
            # Few values, so that some are tied.
            st.lists(st.sampled_from([-30.0, -2.0, -1.5, -0.25]), min_size=n, max_size=n),
            st.lists(st.integers(1, 9), min_size=n, max_size=n),
            st.lists(st.text(min_size=1, max_size=9), min_size=n, max_size=n),
        )
    ),
}


def values(name: str, inputs: Sequence[tuple[Any, ...]], **knobs: str) -> list[float]:
    """The metric's values of several examples; the first of several options is the answer."""
    found = METRICS.load(name)(*zip(*inputs, strict=True), **knobs)
    return [each[0] for each in found] if METRICS.get(name).kind == "choice" else list(found)


def share_by_hand(values: Sequence[float]) -> tuple[float, float]:
    """The two p for which the share of `values` is 1.96 standard errors of p away, by bisection."""
    share, n = sum(values) / len(values), len(values)

    def bound(near: float, far: float) -> float:
        for _ in range(200):
            middle = (near + far) / 2
            inside = abs(share - middle) <= 1.959963984540054 * math.sqrt(middle * (1 - middle) / n)
            near, far = (middle, far) if inside else (near, middle)
        return near

    return bound(share, 0.0), bound(share, 1.0)


def mean_by_hand(values: Sequence[float]) -> tuple[float, float]:
    """The middle 95 % of the means of resamples, drawn one by one."""
    draw = random.Random(7)
    means = sorted(sum(draw.choices(values, k=len(values))) / len(values) for _ in range(20_000))
    return means[500], means[-501]


INTERVALS = {"share": share_by_hand, "mean": mean_by_hand}


def test_every_metric_has_its_row_here() -> None:
    assert LAWS.keys() == METRICS.methods.keys()


@pytest.mark.parametrize("name", LAWS)
def test_a_file_tells_what_is_judged_how_it_is_scored_and_which_direction_is_better(name: str) -> None:
    one = METRICS.get(name)
    assert one.kind in INPUTS
    assert one.score in INTERVALS
    better, worse = values(name, [LAWS[name].better, LAWS[name].worse])
    assert {"higher": better > worse, "lower": better < worse}[one.better]


@pytest.mark.parametrize("name", LAWS)
@given(data=st.data())
def test_a_value_is_that_of_the_formula_whatever_stands_beside_it(name: str, data: st.DataObject) -> None:
    cases = data.draw(st.lists(INPUTS[METRICS.get(name).kind], min_size=1, max_size=5))
    found = values(name, cases)
    assert found == pytest.approx([LAWS[name].value(*case) for case in cases], abs=1e-12)
    assert found == [values(name, [case])[0] for case in cases]
    if METRICS.get(name).score == "share":
        assert {*found} <= {True, False}


@pytest.mark.parametrize(
    ("text", "other", "same"),
    [
        ("Paris", " paris. ", True),
        ("We add.\n#### 1 234.", "1234", True),
        ("#### 1 #### 2", "2", True),
        ("New York", "newyork", True),
        ("...", "", True),
        ("a\nb", "ab", False),
        ("3.14", "314", False),
        ("43", "42", False),
    ],
)
def test_exact_compares_the_texts_that_the_paper_compares(text: str, other: str, same: bool) -> None:
    assert values("exact", [(text, other)]) == [same]


@pytest.mark.parametrize(("knob", "taken"), [("none", 0), ("tokens", 2), ("characters", 1)])
def test_the_option_that_is_chosen_depends_on_what_its_likelihood_is_divided_by(knob: str, taken: int) -> None:
    # Per token -3, -2 and -1.5; per character -1.5, -0.4 and -0.86.
    sums, tokens, texts = (-3.0, -4.0, -6.0), (1, 2, 4), ("no", "absolutely", "perhaps")
    found = METRICS.load("choice")([sums], [tokens], [texts], normalise=knob)
    assert found == [[place == taken for place in range(3)]]


def test_a_tie_is_no_choice() -> None:
    choose = METRICS.load("choice")
    assert choose([(-1.0, -1.0, -2.0)], [(1, 1, 1)], [("a", "b", "c")]) == [[False] * 3]
    assert choose([(-100.0, -100.00001)], [(1, 1)], [("a", "b")]) == [[False, False]], "equal but for rounding"
    assert choose([(-1.0, -1.001)], [(1, 1)], [("a", "b")]) == [[True, False]]


@pytest.mark.parametrize(("right", "n"), [(0, 7), (3, 7), (7, 7), (41, 200)])
def test_the_interval_of_a_share_solves_the_equation_of_the_score_test(right: int, n: int) -> None:
    drawn = [1.0] * right + [0.0] * (n - right)
    assert interval("share", drawn) == pytest.approx(share_by_hand(drawn), abs=1e-9)


@pytest.mark.parametrize("n", [5, 40])
def test_the_interval_of_a_mean_holds_the_middle_of_resampled_means(n: int) -> None:
    drawn = [random.Random(n + place).expovariate(1.0) for place in range(n)]
    low, high = mean_by_hand(drawn)
    assert interval("mean", drawn) == pytest.approx((low, high), abs=0.05 * (high - low))


def likelihoods_by_hand(base: BaseModel, example: Example) -> list[float]:
    """The log-likelihood of each token that is learnt, from one pass over one example."""
    encoded = base.encode(example)
    logits = base.model(input_ids=torch.tensor([encoded.ids])).logits[0].log_softmax(dim=-1)
    return [float(logits[place - 1, encoded.ids[place]]) for place in range(encoded.start, len(encoded.ids))]


def measured_by_hand(base: BaseModel, example: Example, kind: str) -> tuple[Any, ...]:
    """What a metric of this kind judges: four greedy tokens beside the answer, the mean log-likelihood per token, or
    the options, the answer first.
    """
    if kind == "choice":
        options = [example.completion, *(other for other in example.choices if other != example.completion)]
        each = [likelihoods_by_hand(base, replace(example, completion=option)) for option in options]
        return [sum(one) for one in each], [len(one) for one in each], options
    if kind == "likelihood":
        each_token = likelihoods_by_hand(base, example)
        return (sum(each_token) / len(each_token),)
    encoded = base.encode(example)
    ids = [*encoded.opening.ids]
    for _ in range(4):
        token = int(base.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token in encoded.opening.ends:
            break
        ids.append(token)
    return base.encoder.written(encoded.opening, ids[len(encoded.opening.ids) :])[0], example.completion


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", LAWS)
def test_an_evaluation_scores_the_mean_of_the_values_with_its_interval(name: str, tmp_path: Path) -> None:
    base, law, one = llama(), LAWS[name], METRICS.get(name)
    # Some answers are right: those that the base gives.
    answered = [measured_by_hand(base, example, "output")[0] for example in examples(12)]
    task = [
        Example(
            id=example.id,
            prompt=example.prompt,
            completion=answer if place % 3 and answer.strip() else "no",
            choices=(answer if answer.strip() else "yes", "no", "no", f"{place}"),
        )
        for place, (example, answer) in enumerate(zip(examples(12), answered, strict=True))
    ]
    rows = tmp_path / "rows.jsonl"
    [score] = evaluate(base, [System(name="base")], task, EvalOptions(metric=name, max_new_tokens=4), rows_path=rows)
    expected = [law.value(*measured_by_hand(base, example, one.kind)) for example in task]
    assert len({*expected}) > 1
    stored = {row["id"]: row for row in map(json.loads, rows.read_text().splitlines())}
    assert [stored[example.id]["value"] for example in task] == pytest.approx(expected, rel=1e-4)
    assert score.value == pytest.approx(sum(expected) / 12, rel=1e-4)
    low, high = INTERVALS[one.score](expected)
    assert (score.low, score.high) == pytest.approx((low, high), abs=0.05 * (high - low))
    assert (stored["1"]["text"] is None, score.cut is None) == (one.kind == "likelihood", one.kind != "output")


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("normalise", ["none", "tokens", "characters"])
def test_the_choice_of_a_model_is_that_of_a_loop_over_the_options(normalise: str, tmp_path: Path) -> None:
    base, rows = llama(), tmp_path / "rows.jsonl"
    task = [
        replace(example, choices=(word, word[::-1], word[:2], f"{word[2]} {word}", example.completion))
        for example in examples(12)
        for word in [str(example.prompt)[-3:]]
    ]
    evaluate(base, [System(name="base")], task, EvalOptions(metric="choice", normalise=normalise), rows_path=rows)
    taken = []
    for example in task:
        scores = {}
        for text in example.choices:
            each = likelihoods_by_hand(base, replace(example, completion=text))
            scores[text] = sum(each) / {"none": 1, "tokens": len(each), "characters": len(text)}[normalise]
        taken.append(max(scores, key=lambda text: scores[text]))
    assert len({*taken}) > 1
    stored = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["text"] for row in stored] == taken
    assert [row["value"] for row in stored] == [text == one.completion for text, one in zip(taken, task, strict=True)]
    # A row counts for one way of choosing.
    keys = {row["key"] for row in stored}
    other = EvalOptions(metric="choice", normalise="tokens" if normalise == "none" else "none")
    evaluate(base, [System(name="base")], task, other, rows_path=rows)
    assert keys.isdisjoint(json.loads(line)["key"] for line in rows.read_text().splitlines())


def test_an_example_without_choices_is_named_before_any_work() -> None:
    task = [replace(example, choices=("aa", example.completion)) for example in examples(5)]
    lacking = [*task[:2], *(replace(example, choices=()) for example in task[2:])]
    with pytest.raises(DataError, match=r"^no choices in 3 of 5 examples, first in 3$"):
        evaluate(llama(), [System(name="base")], lacking, EvalOptions(metric="choice"))


def test_a_knob_belongs_to_its_metric() -> None:
    with pytest.raises(UsageError, match="metric exact takes no --normalise"):
        EvalOptions(normalise="tokens")
    assert EvalOptions(metric="nll").knobs == {}
    assert EvalOptions(metric="choice", normalise="tokens").knobs == {"normalise": "tokens"}


def test_help_and_completion_name_every_metric_without_heavy_imports() -> None:
    code = """
import sys
from lora_cli.app import main
try:
    main()
finally:
    assert not {"torch", "numpy", "transformers", "lora_cli.steps"} & set(sys.modules)
"""
    told = subprocess.run([sys.executable, "-c", code, "eval", "--help"], capture_output=True, text=True, check=True)
    text = " ".join(told.stdout.split())
    for one in METRICS.methods.values():
        # Lines break at hyphens too.
        assert f"{one.name}: {one.summary[:-1]}, {one.better} is better" in text.replace("- ", "-")
        assert f"## {one.name}\n" in page()
    words = {"_LORA_COMPLETE": "complete_bash", "COMP_WORDS": "lora eval --metric ", "COMP_CWORD": "3"}
    told = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **words}, capture_output=True, text=True, check=True
    )
    assert told.stdout.split() == [*METRICS.methods]


LETTERS = '''"""Letters in common."""
from lora_cli.methods import method


@method("output", score="mean", better="higher")
def letters(outputs, expected):
    """Share of letters in common, in the mean.

    Source: this test.
    """
    return [len({*a} & {*b}) / max(1, len({*a} | {*b})) for a, b in zip(outputs, expected, strict=True)]
'''


WITH_MORE = """
from pathlib import Path
from lora_cli import metrics
from lora_cli.errors import DataError, UsageError
from lora_cli.methods import MethodFolder
more = MethodFolder("lora_cli.metrics", "metric")
more.folder = Path("more")
metrics.__path__.append("more")
metrics.METRICS.methods.update(more.methods)
from lora_cli.app import main
main()
"""


@pytest.mark.slow
def test_one_new_file_is_a_new_metric_of_the_command(own_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own_world.folder)
    ok("pool", "sync")
    Path("more").mkdir()
    Path("more", "letters.py").write_text(LETTERS)
    words = ("eval", "pool/kestrel/outer", "--metric", "letters", "--max-new-tokens", "2", "--json", "-o", "rows.jsonl")
    told = subprocess.run(
        [sys.executable, "-c", WITH_MORE, *words],
        env={**os.environ, "PYTHONPATH": str(Path(metrics.__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    scores = {row["system"]: row for row in json.loads(told.stdout)["rows"]}
    assert "eval: pool/kestrel/outer changed the output on" in told.stderr
    assert "answers cut at --max-new-tokens 2" in told.stderr
    assert "wrong answers" not in told.stderr
    # The file has the rows as they ended, a score takes them in the order of the task.
    rows = sorted(
        map(json.loads, Path("rows.jsonl").read_text().splitlines()), key=lambda row: int(row["id"].rpartition("/")[2])
    )
    for system, score in scores.items():
        own = [row["value"] for row in rows if row["system"] == system]
        assert any(0 < value < 1 for value in own)
        assert score["value"] == pytest.approx(sum(own) / len(own))
        assert (score["low"], score["high"]) == tuple(interval("mean", own))
