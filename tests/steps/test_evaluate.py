import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_cli.algebra.lowrank import LowRank
from lora_cli.errors import DataError, NothingMatched, OutputError, Refused, UsageError
from lora_cli.formats.reader import OpenAdapter
from lora_cli.metrics.exact import exact
from lora_cli.models.answering import Asked, Told, _Answering
from lora_cli.models.base_model import BaseModel
from lora_cli.models.generate import generate
from lora_cli.recipes import EvalOptions, Recipe, TrainOptions
from lora_cli.records import Example, Score
from lora_cli.scores import paired_difference, wilson
from lora_cli.steps.evaluate import groups as grouped
from lora_cli.steps.evaluate.evaluate import System, Updates, evaluate
from lora_cli.steps.train.train import train
from tests.adapters_on_disk import random_factors, write_adapter
from tests.tiny_bases import STORIES, examples, llama, needs_stories, opened

N = 24
BASE = System(name="base")


@pytest.fixture(scope="module")
def base() -> Iterator[BaseModel]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield llama()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def skilled(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> System:
    """A LoRA that mostly knows the task."""
    folder = tmp_path_factory.mktemp("skilled")
    train(
        base,
        examples(64),
        folder,
        options=TrainOptions(rank=8, alpha=16, dropout=0.0),
        recipe=Recipe(steps=120, lr=1e-2),
    )
    adapter = opened(folder)
    return System(name="skilled", updates={m: adapter.read(m) for m in adapter.modules}, version=adapter.ref.pinned)


@pytest.fixture(scope="module")
def idle(base: BaseModel) -> System:
    """An adapter that loads and changes nothing."""
    update = LowRank(torch.zeros(48, 2), torch.randn(2, 32))
    return System(name="idle", updates={"model.layers.0.mlp.up_proj": update}, version="idle@0")


def run(base: BaseModel, *systems: System, **options: Any) -> dict[str, Score]:
    recorded = {name: options.pop(name) for name in [*options] if name in EvalOptions.flags()}
    chosen = EvalOptions(**{"max_new_tokens": 4, "batch_size": 8, **recorded})
    scores = evaluate(base, systems, examples(N), chosen, **options)
    assert [score.system for score in scores] == [system.name for system in systems]
    return {score.system: score for score in scores}


def test_scores_equal_what_the_outputs_say(base: BaseModel, skilled: System, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    scores = run(base, BASE, skilled, rows_path=rows)
    wanted = examples(N)
    prompts = [example.prompt for example in wanted]
    plain = generate(base, prompts, max_new_tokens=4)
    with base.applied(skilled.updates):
        adapted = generate(base, prompts, max_new_tokens=4)
        likelihoods = base.log_likelihoods(wanted)
    right = exact(adapted, [example.completion for example in wanted])
    wrong = exact(plain, [example.completion for example in wanted])
    assert sum(right) / N > 0.4
    assert sum(wrong) == 0
    score = scores["skilled"]
    assert (score.value, score.low, score.high, score.n) == (sum(right) / N, *wilson(sum(right), N), N)
    difference = paired_difference([float(r) for r in right], [float(w) for w in wrong])
    assert (score.baseline, score.delta, score.p) == ("base", difference.delta, difference.p)
    assert (score.delta_low, score.delta_high) == (difference.low, difference.high)
    assert score.changed == sum(one != other for one, other in zip(plain, adapted, strict=True))
    assert score.log_likelihood == pytest.approx(sum(likelihoods) / N, rel=1e-4)
    assert score.tokens_per_second is not None
    assert score.tokens_per_second > 0
    assert (scores["base"].delta, scores["base"].changed, scores["base"].baseline) == (None, None, "")
    stored = [json.loads(line) for line in rows.read_text().splitlines()]
    assert {(row["system"], row["id"]) for row in stored} == {(s, e.id) for s in ("base", "skilled") for e in wanted}
    by_id = {row["id"]: row for row in stored if row["system"] == "skilled"}
    assert [by_id[example.id]["text"] for example in wanted] == adapted


def test_an_adapter_without_effect_shows_as_such(base: BaseModel, idle: System) -> None:
    score = run(base, BASE, idle)["idle"]
    assert (score.changed, score.details["moved"]) == (0, 0)
    assert (score.delta, score.p) == (0, 1)


def test_an_adapter_too_weak_to_change_an_output_moves_the_likelihood(base: BaseModel, skilled: System) -> None:
    assert skilled.updates is not None
    faint = System(name="faint", updates={m: u.scaled(1e-3) for m, u in skilled.updates.items()}, version="faint")
    score = run(base, BASE, faint)["faint"]
    assert score.changed is not None
    assert score.changed < N / 2
    assert score.details["moved"] == N


def test_nll_generates_nothing_and_lower_is_better(
    base: BaseModel, skilled: System, idle: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Answering, "_write", None)
    scores = run(base, BASE, skilled, idle, metric="nll")
    with base.applied(skilled.updates):
        expected = -sum(base.log_likelihoods(examples(N))) / N
    score = scores["skilled"]
    assert score.value == pytest.approx(expected, rel=1e-4)
    assert score.low < score.value < score.high
    assert score.delta_high is not None
    assert score.delta_high < 0
    assert (score.changed, scores["idle"].changed, score.tokens_per_second) == (N, 0, None)


def test_scores_are_paired_with_the_baseline_that_was_named(base: BaseModel, skilled: System, idle: System) -> None:
    scores = run(base, BASE, skilled, idle, baseline="skilled")
    assert scores["base"].delta == -scores["skilled"].value
    assert scores["idle"].baseline == "skilled"
    assert scores["idle"].changed == 0


def test_batch_size_changes_nothing_but_speed(base: BaseModel, skilled: System) -> None:
    one, many = (run(base, BASE, skilled, batch_size=size)["skilled"] for size in (1, 16))
    assert (one.value, one.changed) == (many.value, many.changed)
    assert one.log_likelihood == pytest.approx(many.log_likelihood, rel=1e-5)


class Killed(Exception):
    pass


def without_speed(scores: dict[str, Score]) -> list[tuple[Any, ...]]:
    return [(s.system, s.value, s.low, s.high, s.delta, s.p, s.changed, s.log_likelihood) for s in scores.values()]


def count(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many examples each group of systems is asked."""
    made: list[int] = []
    real = grouped.answers

    def counted(
        base: BaseModel, asked: Sequence[Asked], *rest: Any, **options: Any
    ) -> Iterator[list[tuple[int, Told]]]:
        made.append(len(asked))
        return real(base, asked, *rest, **options)

    monkeypatch.setattr(grouped, "answers", counted)
    return made


def test_a_killed_evaluation_goes_on_where_it_was(
    base: BaseModel, skilled: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(what: str, done: int, total: int) -> None:
        if (what, done) == ("2 systems", N + 10):
            raise Killed

    rows = tmp_path / "rows.jsonl"
    whole = run(base, BASE, skilled)
    with pytest.raises(Killed):
        run(base, BASE, skilled, rows_path=rows, progress=kill)
    with rows.open("a") as file:
        file.write('{"system": "skilled", "id"')
    made = count(monkeypatch)
    resumed = run(base, BASE, skilled, rows_path=rows)
    assert sum(made) == N - 10
    assert [row[:7] for row in without_speed(resumed)] == [row[:7] for row in without_speed(whole)]
    made.clear()
    assert run(base, BASE, skilled, rows_path=rows) == resumed
    assert made == []
    assert sorted(file.name for file in rows.parent.glob("*rows*")) == ["rows.jsonl"]


def test_rows_of_another_version_or_setting_are_not_taken_up(
    base: BaseModel, skilled: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.jsonl"
    run(base, BASE, skilled, rows_path=rows)
    made = count(monkeypatch)
    newer = System(name="skilled", updates=skilled.updates, version="skilled@1")
    run(base, BASE, newer, rows_path=rows)
    assert sum(made) == N
    made.clear()
    run(base, BASE, newer, rows_path=rows, max_new_tokens=3)
    assert sum(made) == 2 * N
    assert len(rows.read_text().splitlines()) == 2 * N


@pytest.mark.parametrize(("metric", "verdicts"), [("exact", (True, False)), ("nll", (None, None))])
def test_rows_of_a_file_from_before_they_held_a_value_are_taken_up(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: str, verdicts: tuple[bool | None, ...]
) -> None:
    rows = tmp_path / "rows.jsonl"
    run(base, BASE, metric=metric, rows_path=rows)
    older = [json.loads(line) for line in rows.read_text().splitlines()]
    for place, row in enumerate(older):
        del row["value"]
        row["correct"] = verdicts[place % 2]
    rows.write_text("".join(json.dumps(row) + "\n" for row in older))
    monkeypatch.setattr(grouped, "answers", None)
    value = run(base, BASE, metric=metric, rows_path=rows)["base"].value
    assert value == (0.5 if metric == "exact" else pytest.approx(-sum(row["log_likelihood"] for row in older) / N))


def test_rows_of_systems_that_are_not_asked_for_stay(
    base: BaseModel, skilled: System, idle: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.jsonl"
    first = run(base, BASE, skilled, rows_path=rows)
    run(base, BASE, idle, rows_path=rows, max_new_tokens=3)
    stored = [json.loads(line)["system"] for line in rows.read_text().splitlines()]
    assert {name: stored.count(name) for name in stored} == {"base": N, "skilled": N, "idle": N}
    made = count(monkeypatch)
    again = run(base, BASE, skilled, rows_path=rows)
    assert sum(made) == N
    assert again["skilled"].value == first["skilled"].value


def test_an_adapter_is_read_once_and_not_at_all_when_its_rows_are_there(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = {name: shape for name, shape in base.shapes.items() if "proj" in name}
    adapter = opened(write_adapter(tmp_path / "adapter", random_factors(modules, 2, seed=0)))
    read: list[str] = []
    real = OpenAdapter.read
    monkeypatch.setattr(OpenAdapter, "read", lambda self, module: read.append(module) or real(self, module))
    system = System(name="adapter", updates=Updates(adapter), version=adapter.ref.pinned)
    run(base, BASE, system, rows_path=tmp_path / "rows.jsonl")
    assert sorted(read) == sorted(modules)
    read.clear()
    run(base, BASE, system, rows_path=tmp_path / "rows.jsonl")
    assert read == []


def test_a_file_of_something_else_is_not_written_over(base: BaseModel, tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    for content in ("my notes\n", '{"id": "1"}\n'):
        notes.write_text(content)
        with pytest.raises(OutputError, match="not a file of evaluation rows"):
            run(base, BASE, rows_path=notes)
        assert notes.read_text() == content
    with pytest.raises(OutputError, match="cannot be written"):
        run(base, BASE, rows_path=notes / "rows.jsonl")


def test_what_cannot_be_evaluated_is_said_before_any_work(base: BaseModel, skilled: System, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    other = System(name="other", updates={"model.layers.9.mlp.up_proj": LowRank(torch.ones(48, 1), torch.ones(1, 32))})
    with pytest.raises(Refused, match=r"other does not fit acme/tiny.*modules that match: 0 of 1"):
        run(base, BASE, other, rows_path=rows)
    assert not rows.exists()
    with pytest.raises(NothingMatched, match="no system 'zero'"):
        run(base, BASE, skilled, baseline="zero")
    with pytest.raises(UsageError, match="two systems are called 'skilled'"):
        run(base, BASE, skilled, skilled)
    with pytest.raises(UsageError, match="unknown metric"):
        run(base, BASE, metric="bleu")
    with pytest.raises(NothingMatched, match="no examples"):
        evaluate(base, [BASE], [])
    with pytest.raises(DataError, match="takes 64"):
        evaluate(base, [BASE], [Example(id="1", prompt="x" * 60, completion="y")])


def test_wrong_answers_that_were_cut_are_counted(base: BaseModel, skilled: System) -> None:
    short = run(base, BASE, skilled, max_new_tokens=1)
    assert {name: (score.value, score.cut) for name, score in short.items()} == {"base": (0, N), "skilled": (0, N)}
    whole = run(base, BASE, skilled)["skilled"]
    assert (whole.value, whole.cut) == (1.0, 0)
    assert [score.cut for score in run(base, BASE, skilled, metric="nll").values()] == [None, None]


@pytest.mark.parametrize("continues", [True, False])
def test_an_output_that_does_not_continue_the_prompt_is_judged_as_an_empty_one(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch, continues: bool
) -> None:
    def told(base: BaseModel, asked: Sequence[Asked], *rest: Any, **options: Any) -> Iterator[list[tuple[int, Told]]]:
        yield [(place, Told(-1.0, True, 0.1, one.encoded.answer, 2, continues)) for place, one in enumerate(asked)]

    monkeypatch.setattr(grouped, "answers", told)
    assert run(base, BASE)["base"].value == float(continues)


@pytest.mark.slow
@needs_stories
def test_on_a_real_base_two_adapters_are_evaluated_on_one_load(tmp_path: Path) -> None:
    from lora_cli.models.ref import load

    real = load(str(STORIES))
    animals = ["cat", "dog", "bird", "fish", "cow", "pig", "bear", "duck", "frog", "fox", "hen", "bee"]
    data = [Example(id=a, prompt=f"Once there was a {a}.", completion="It was so sad.") for a in animals]
    systems = [BASE]
    for steps in (2, 60):
        folder = tmp_path / str(steps)
        folder.mkdir()
        train(
            real, data, folder, options=TrainOptions(rank=4, alpha=8, dropout=0.0), recipe=Recipe(steps=steps, lr=1e-2)
        )
        adapter = opened(folder)
        updates = {module: adapter.read(module) for module in adapter.modules}
        systems.append(System(name=f"{steps} steps", updates=updates, version=adapter.ref.pinned))
    # This model has no use for its end token, so it is stopped after the seven tokens of the answer.
    base_score, short, long = evaluate(real, systems, data, EvalOptions(max_new_tokens=7))
    assert base_score.value == 0
    assert long.value > 0.5
    assert long.changed == len(data)
    assert short.log_likelihood is not None
    assert long.log_likelihood is not None
    assert base_score.log_likelihood is not None
    assert base_score.log_likelihood < short.log_likelihood < long.log_likelihood
