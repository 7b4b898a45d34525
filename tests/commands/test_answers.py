"""`lora runs answers`: what a system wrote, beside what it was asked for and what was expected."""

import json
from pathlib import Path

import pytest

from lora_cli.world import World
from tests.cli import ok, refused

OUTER, MIRROR = "pool/kestrel/outer", "pool/tarn/mirror"


@pytest.fixture
def here(own_world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """A small world of one's own, with one evaluation of two adapters on 12 examples."""
    monkeypatch.chdir(own_world.folder)
    lines = (own_world.folder / "tasks" / "outer.test.jsonl").read_text(encoding="utf-8").splitlines()[:12]
    Path("few.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    ok("eval", OUTER, MIRROR, "--data", "few.jsonl", "-o", "rows.jsonl")
    return own_world


def test_wrong_answers_stand_beside_the_expected_ones(here: World) -> None:
    tasks = [json.loads(line) for line in Path("few.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    wrong = [row for row in rows if not row["value"]]
    document = json.loads(ok("runs", "answers", "--json").out)
    assert document["schema"] == "lora.runs.answers/1"
    assert 0 < len(document["rows"]) == min(20, len(wrong))
    for shown in document["rows"]:
        [row] = [row for row in rows if (row["system"], row["id"]) == (shown["system"], shown["id"])]
        assert (shown["given"], shown["correct"]) == (row["text"], False)
        task = tasks[int(shown["id"]) - 1] if shown["id"].isdecimal() else next(
            one for one in tasks if one.get("id") == shown["id"]
        )  # fmt: skip
        assert (shown["prompt"], shown["expected"]) == (task["prompt"], task["completion"])

    told = ok("runs", "answers", "--all", "-n", "100", "--system", OUTER)
    assert len(told.out.splitlines()) == 12
    assert "of 12 answers wrong · 12 shown" in told.err
    assert len(json.loads(ok("runs", "answers", "--all", "-n", "100", "--json").out)["rows"]) == 36
    assert "no answers of 'nobody'" in refused(3, "runs", "answers", "--system", "nobody")


def test_data_elsewhere_is_found_by_the_run(here: World) -> None:
    Path("elsewhere").mkdir()
    Path("few.jsonl").rename("elsewhere/few.jsonl")
    ok("eval", MIRROR, "--data", "elsewhere/few.jsonl", "-o", "others.jsonl")
    assert "of 24 answers wrong" in ok("runs", "answers").err
    Path("elsewhere/few.jsonl").unlink()
    assert "few.jsonl, the data of" in refused(1, "runs", "answers")


def test_a_failed_evaluation_without_rows_is_not_the_last_with_answers(here: World) -> None:
    before = ok("runs", "answers", "--json").out
    refused(1, "eval", MIRROR, "--data", "few.jsonl", "-o", "few.jsonl")
    assert ok("runs", "answers", "--json").out == before
    failed = ok("runs", "list", "-q", "-n", "1").out.strip()
    error = refused(1, "runs", "answers", failed)
    assert "few.jsonl: not a file of evaluation rows\n  name another run: see lora runs list" in error


def test_rows_of_systems_that_the_run_did_not_evaluate_are_left_out(here: World) -> None:
    ok("eval", MIRROR, "--data", "few.jsonl", "-o", "rows.jsonl")
    found = json.loads(ok("runs", "answers", "--all", "-n", "100", "--json").out)["rows"]
    assert {row["system"] for row in found} == {"base", MIRROR}


def test_what_changes_between_two_systems_stands_side_by_side(here: World) -> None:
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    before, after = ({row["id"]: row for row in rows if row["system"] == name} for name in ("base", OUTER))
    differ = [id for id in before if before[id]["text"] != after[id]["text"]]
    fixed = {id for id in before if not before[id]["value"] and after[id]["value"]}
    assert fixed, "the adapter knows this task"

    document = json.loads(ok("runs", "answers", "--diff", "base", OUTER, "--json").out)
    assert (document["schema"], document["counts"]["fixed"]) == ("lora.runs.answers.diff/1", len(fixed))
    shown = {row["id"]: row for row in document["rows"]}
    assert {*shown} == {*differ}
    assert {id for id, row in shown.items() if row["change"] == "fixed"} == fixed
    for id, row in shown.items():
        assert (row["before"], row["after"]) == (before[id]["text"], after[id]["text"])
        assert (row["before_correct"], row["after_correct"]) == (before[id]["value"] == 1, after[id]["value"] == 1)
        assert row["prompt"].startswith("outer:")

    back = ok("runs", "answers", "--diff", OUTER, "base", "--columns", "change,id")
    kinds = [line.split("\t")[0] for line in back.out.splitlines()]
    assert kinds.count("broken") == len(fixed)
    assert kinds == sorted(kinds, key=["broken", "fixed", "different"].index), "the broken ones first"
    assert (
        f"{len(fixed)} broken, 0 fixed, {len(differ) - len(fixed)} different, {12 - len(differ)} same of 12" in back.err
    )


def test_a_difference_shows_the_wrong_ones_or_all_on_request(here: World) -> None:
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    wrong = [row["id"] for row in rows if row["system"] == MIRROR and not row["value"]]
    assert sorted(ok("runs", "answers", "--diff", OUTER, MIRROR, "--wrong", "-q").out.split()) == sorted(wrong)
    assert len(ok("runs", "answers", "--diff", OUTER, OUTER, "--all", "-q").out.split()) == 12
    assert ok("runs", "answers", "--diff", OUTER, OUTER, "-q").out == ""
    assert ok("eval", "show", "--wrong").out == ok("runs", "answers", "--wrong").out == ok("runs", "answers").out
    assert "no answers of 'nobody'" in refused(3, "runs", "answers", "--diff", "base", "nobody")
    assert "leave out --system" in refused(2, "runs", "answers", "--diff", "base", OUTER, "--system", "base")
    assert "no column 'given'" in refused(2, "runs", "answers", "--diff", "base", OUTER, "--columns", "given")


def test_the_choices_of_an_evaluation_are_its_answers(here: World) -> None:
    examples = [json.loads(line) for line in Path("few.jsonl").read_text().splitlines()]
    given = [{**one, "choices": [one["prompt"][-4:], one["completion"], "aaaa"]} for one in examples]
    Path("given.jsonl").write_text("".join(json.dumps(one) + "\n" for one in given))
    told = ok("eval", OUTER, "--data", "given.jsonl", "--metric", "choice", "--normalise", "tokens", "--json")
    document = json.loads(told.out)
    assert (document["metric"], document["normalise"]) == ("choice", "tokens")
    assert "eval: pool/kestrel/outer changed the choice on" in told.err
    shown = json.loads(ok("runs", "answers", "--all", "-n", "100", "--json").out)["rows"]
    choices = {one["id"]: [*one["choices"], ""] for one in given}
    assert len(shown) == 24
    assert all(row["given"] in choices[row["id"]] for row in shown)
    right = sum(row["correct"] for row in shown if row["system"] == OUTER)
    assert document["rows"][1]["value"] == right / 12
    line = refused(1, "eval", OUTER, "--data", "few.jsonl", "--metric", "choice")
    assert f"few.jsonl: no choices in 12 of 12 examples, first in {examples[0]['id']}" in line
    assert "metric exact takes no --normalise" in refused(2, "eval", OUTER, "--normalise", "tokens")


def test_answers_need_the_data_as_it_was(here: World) -> None:
    data = Path("few.jsonl").rename("moved.jsonl")
    told = refused(1, "runs", "answers")
    assert "few.jsonl, the data of " in told
    assert "is missing or has changed" in told
    assert ok("runs", "answers", "--data", "moved.jsonl").out
    data.write_text(data.read_text() + '{"prompt": "a", "completion": "b"}\n')
    assert "has changed" in refused(1, "runs", "answers", "--data", "moved.jsonl")


def test_a_run_without_answers_says_so(here: World) -> None:
    ok("eval", OUTER, "--data", "few.jsonl", "--metric", "nll")
    assert ok("runs", "answers", "--all").out, "of the evaluation before"
    run = ok("runs", "list", "--command", "eval", "-q", "-n", "1").out.strip()
    assert "scored likelihoods alone: it has no answers" in refused(3, "runs", "answers", run)
    ok("merge", OUTER, MIRROR)
    run = ok("runs", "list", "--command", "merge", "-q").out.strip()
    assert "is no evaluation: it has no answers" in refused(3, "runs", "answers", run)
    ok("runs", "rm", *ok("runs", "list", "-q").out.split())
    assert "no evaluation with answers yet" in refused(3, "runs", "answers")
