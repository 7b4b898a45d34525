"""A study on a small base: what its cells are, that they are done once, and that its parts make the whole."""

import json
import shutil
from pathlib import Path

import pytest

import lora_cli
from lora_cli.steps.study.work import Worker
from tests.cli import lora, ok, refused
from tests.small_study import GRID, SHORT, WORDS, results, table

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_table_has_each_cell_once_and_its_scores_are_those_of_eval(place: Path) -> None:
    rows = table(place / "calm")
    assert len(rows) == 15
    assert [row["cell"] for row in rows] == sorted({row["cell"] for row in rows})
    made = {(row["system"], row["pool"], row["seed"]) for row in rows}
    assert ("base", "", None) in made
    assert ("average", "relevant", None) in made, "an average draws nothing: one cell is enough"
    assert {("average", "random", 0), ("average", "random", 1), ("adaptive", "noise", 1), ("target", "", 1)} <= made
    assert not any(system == "average" and pool == "noise" for system, pool, _ in made)
    row = next(row for row in rows if (row["system"], row["pool"]) == ("average", "relevant"))
    told = ok("eval", f"calm/cells/{row['cell']}/adapter", "--data", "calm/test.jsonl", "--metric", "nll", "--json")
    scores = {score["system"] == "base": score["value"] for score in json.loads(told.out)["rows"]}
    assert row["value"] == pytest.approx(scores[False], rel=1e-6)
    assert next(row["value"] for row in rows if row["system"] == "base") == pytest.approx(scores[True], rel=1e-6)


def test_results_hold_no_time_and_no_place(place: Path, calm: Path) -> None:
    for file in (place / "calm").glob("cells/*/result.json"):
        text = file.read_text()
        assert str(calm) not in text
        assert "seconds" not in text
        assert str(calm.parent) not in text


def test_a_second_run_does_nothing_and_a_lost_cell_alone_is_done_again(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, done = results(place / "calm"), list[str]()
    honest = Worker.run
    monkeypatch.setattr(Worker, "run", lambda self, name: done.append(name) or honest(self, name))
    ok(*WORDS, "-o", "calm", "--jobs", "1")
    assert done == []
    lost = next((place / "calm" / "cells").glob("adaptive-noise-s1-*"))
    shutil.rmtree(lost)
    ok(*WORDS, "-o", "calm", "--jobs", "1")
    assert done == [lost.name]
    assert results(place / "calm") == before


@pytest.mark.slow
def test_shards_in_any_order_and_twice_make_the_table_of_one_run(place: Path) -> None:
    for shard in range(3):
        told = lora(*WORDS, "--shard", f"{shard}/3", "-o", f"part{shard}", "--jobs", "1")
        assert told.code == 0, told
    parts = ["part2", "part0", "part1"]
    whole = results(place / "calm")
    assert sum(len(results(place / part)) - 1 for part in parts) == len(whole) - 1
    assert lora("study", "collect", *parts[:2], "-o", "half").code == 6
    for out, order in (("one", parts), ("other", parts[::-1]), ("one", parts)):
        ok("study", "collect", *order, "-o", out)
        assert results(place / out) == whole
    ok(*WORDS, "-o", "one", "--jobs", "1")
    assert results(place / "one") == whole


def test_a_cell_given_twice_is_compared_and_a_difference_names_both(place: Path) -> None:
    shutil.copytree("calm", "twin")
    ok("study", "collect", "calm", "twin", "-o", "both")
    assert results(place / "both") == results(place / "calm")
    file = next((place / "twin").glob("cells/ties-relevant-*/result.json"))
    file.write_text(file.read_text().replace('"n": 12', '"n": 11'))
    told = lora("study", "collect", "calm", "twin", "-o", "new")
    assert told.code == 1
    assert f"calm/cells/{file.parent.name}" in told.err
    assert f"twin/cells/{file.parent.name}" in told.err
    assert not (place / "new").exists()


def test_systems_and_seeds_extend_a_study_and_share_what_is_there(place: Path) -> None:
    before = results(place / "calm")
    more = ("study", "--data", "task.jsonl", "--systems", "base,lorahub", "--pools", "random", "-k", "2")
    told = ok(*more, "--seeds", "1", *SHORT, "-o", "calm", "--jobs", "1")
    assert "lorahub" in told.out
    after = results(place / "calm")
    assert {name: after[name] for name in before if name != "table"} == {
        name: data for name, data in before.items() if name != "table"
    }
    assert {name.rpartition("-")[0] for name in after.keys() - before.keys()} == {"lorahub-random-s0"}


def test_a_study_of_the_base_is_extended_by_systems_that_take_adapters(place: Path) -> None:
    ok("study", "--data", "task.jsonl", "--systems", "base", *SHORT, "-o", "new", "--jobs", "1")
    more = ("--systems", "base,average", "--pools", "random", "-k", "2", "--seeds", "1")
    told = ok("study", "--data", "task.jsonl", *more, *SHORT, "-o", "new", "--jobs", "1")
    assert [line.split("\t")[0] for line in told.out.splitlines()] == ["base", "average"]


def test_a_study_that_was_planned_without_adapters_takes_none_later(place: Path) -> None:
    ok("pool", "rm", *(f"pool/ann/{name}" for name in "abcd"))
    ok("study", "--data", "task.jsonl", "--systems", "base", *SHORT, "-o", "new", "--executor", "slurm")
    ok("pool", "sync")
    error = refused(1, "study", "--data", "task.jsonl", "--systems", "ties", "-k", "2", *SHORT, "-o", "new")
    assert "planned when there was no usable adapter, and ties takes some" in error


def test_the_options_of_the_target_lora_are_named_as_they_are_here(place: Path) -> None:
    words = ("study", "--data", "task.jsonl", "--systems", "target", "-o", "new")
    assert "--target-lr must be above 0, not -1.0" in refused(2, *words, "--target-lr", "-1")
    assert "--target-dropout in [0, 1)" in refused(2, *words, "--target-dropout", "2")
    assert not (place / "new").exists()


def test_a_sync_in_between_does_not_change_a_study(place: Path) -> None:
    ok("pool", "rm", "pool/ann/a")
    lost = next((place / "calm" / "cells").glob("average-relevant-*"))
    before = results(place / "calm")
    shutil.rmtree(lost)
    ok(*WORDS, "-o", "calm", "--jobs", "1")
    assert results(place / "calm") == before


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--systems", "base,adaptiv"), 2, "adaptive"),
        (("--pools", "randm"), 2, "random"),
        (("--systems", "target+target"), 2, "only merges and fits"),
        (("--shard", "3/3"), 2, "I from 0"),
        (("--held-out", "1"), 2, "share between 0 and 1"),
        (("--pools", ""), 2, "average takes the adapters of a pool"),
        (("--quick", "--paper"), 2, "exclude each other"),
        (("--where", "rank>100"), 3, "no usable adapter"),
        (("--metric", "choice"), 1, "choices"),
        (("--data", "nowhere.jsonl"), 1, "no such file"),
    ],
)
def test_what_cannot_be_studied_is_one_clear_line(place: Path, words: tuple[str, ...], code: int, said: str) -> None:
    told = lora("study", "--data", "task.jsonl", *GRID, *SHORT, *words, "-o", "new")
    assert (told.code, told.out) == (code, ""), told
    assert said in told.err, told
    assert not (place / "new").exists()


def test_a_task_too_small_for_its_parts_is_refused(place: Path) -> None:
    lines = (place / "task.jsonl").read_text().splitlines(keepends=True)
    (place / "two.jsonl").write_text("".join(lines[:2]))
    told = lora("study", "--data", "two.jsonl", *GRID, *SHORT, "-o", "new")
    assert told.code == 1
    assert "2 examples cannot be split" in told.err
    assert not (place / "new").exists()


def test_the_folder_of_another_study_is_left_alone(place: Path) -> None:
    before = results(place / "calm")
    lines = (place / "task.jsonl").read_text().splitlines(keepends=True)
    (place / "other.jsonl").write_text("".join(lines[:-1]))
    for words, said in (
        (("--data", "other.jsonl"), "data"),
        (("--steps", "5"), "system adaptive.options.recipe.steps"),
    ):
        told = lora(*WORDS, *words, "-o", "calm")
        assert (told.code, told.out) == (1, "")
        assert "another study" in told.err
        assert said in told.err
    (place / "full").mkdir()
    (place / "full" / "thesis.tex").write_text("years of work")
    told = lora(*WORDS, "-o", "full")
    assert told.code == 1
    assert "no study" in told.err
    assert results(place / "calm") == before


def test_a_study_file_is_its_flags_and_an_unknown_key_has_a_suggestion(place: Path) -> None:
    (place / "study.toml").write_text(
        'data = "task.jsonl"\nmetric = "nll"\nk = 2\nseeds = 1\nbatch-size = 4\nsteps = 4\n'
        'systems = ["base", {name = "sparse", method = "ties", density = 0.3}, {name = "lean", preset = "adaptive", '
        'granularity = "layer", steps = 2}]\npools = ["random", {name = "low", by = "rank", k = 1}]\n'
    )
    told = ok("study", "--file", "study.toml", "-o", "filed", "--dry-run", "--json")
    cells = json.loads(told.out)["rows"]
    assert {(cell["system"], cell["pool"]) for cell in cells} == {
        ("base", ""), ("sparse", "random"), ("sparse", "low"), ("lean", "random"), ("lean", "low"),
    }  # fmt: skip
    assert not (place / "filed").exists()
    ok("study", "--file", "study.toml", "-o", "filed", "--jobs", "1")
    assert len(table(place / "filed")) == 5
    (place / "study.toml").write_text('data = "task.jsonl"\nstepz = 4\n')
    told = lora("study", "--file", "study.toml")
    assert told.code == 2
    assert "unknown key 'stepz'" in told.err
    assert "steps" in told.err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("k = 0", "--k must be at least 1, not 0"),
        ("quick = 3", "quick must be true or false, not 3"),
        ("steps = -3", "--steps must be at least 1, not -3"),
        ('pools = [{name = "none", by = "random", k = 0}]', "pool none: --k must be at least 1"),
        ('systems = [{name = "back", preset = "adaptive", steps = -3}]', "system back: --steps must be at least 1"),
    ],
)
def test_a_study_file_is_held_to_the_kinds_and_bounds_of_its_flags(place: Path, line: str, said: str) -> None:
    (place / "study.toml").write_text(f'data = "task.jsonl"\n{line}\n')
    assert said in refused(2, "study", "--file", "study.toml", "-o", "new")
    assert not (place / "new").exists()


def test_a_broken_adapter_fails_its_cells_and_the_others_go_on(place: Path) -> None:
    """An adapter of the pool whose weights were cut short after the study was planned."""
    shutil.copytree("pool", "own")
    (place / "lora.toml").write_text('base = "base"\npool = "own"\ndb = "own.db"\n')
    ok("pool", "sync")
    words = ("study", "--data", "task.jsonl", "--systems", "base,average,target", "--pools", "random", "-k", "4")
    file = place / "own" / "ann" / "b" / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-8])
    told = lora(*words, *SHORT, "--seeds", "1", "-o", "out", "--jobs", "1")
    assert told.code == 6, told
    assert "1 cell of 3 failed, first average-random-s0-" in told.err
    assert "own/ann/b" in told.err
    assert {row["system"] for row in table(place / "out")} == {"base", "target"}
    file.write_bytes(whole)
    ok(*words, *SHORT, "--seeds", "1", "-o", "out", "--jobs", "1")
    assert {row["system"] for row in table(place / "out")} == {"base", "target", "average"}


def test_pools_by_stored_scores_and_selections_are_pinned_when_the_study_is_planned(place: Path) -> None:
    scores = "".join(
        f"pool/ann/{name},reading,acc,0.{value}\n" for name, value in zip("abcd", (1, 9, 4, 8), strict=True)
    )
    (place / "scores.csv").write_text("adapter,task,metric,value\n" + scores)
    ok("pool", "import", "scores.csv")
    ok("select", "--by", "rank", "-k", "3", "--name", "mine")
    text = (
        'data = "task.jsonl"\nsystems = ["average"]\nmetric = "nll"\n'
        'pools = [{name = "read", by = "evaluation", task = "reading", k = 2}, {name = "own", selection = "mine"}]\n'
    )
    (place / "study.toml").write_text(text)
    ok("study", "--file", "study.toml", "-o", "scored", "--jobs", "1")
    adapters = {row["pool"]: {name.partition("@")[0] for name in row["adapters"]} for row in table(place / "scored")}
    assert adapters["read"] == {"pool/ann/b", "pool/ann/d"}
    assert len(adapters["own"]) == 3
    for wrong, said in (('task = "writing"', "no scores on a task 'writing'"), ('selection = "yours"', "no selection")):
        (place / "study.toml").write_text(
            f'data = "task.jsonl"\nsystems = ["average"]\npools = [{{name = "x", {wrong}}}]\n'
        )
        told = lora("study", "--file", "study.toml", "-o", "new")
        assert (told.code, told.out) == (3, "")
        assert said in told.err
        assert not (place / "new").exists()


def test_a_dry_run_estimates_each_cell_and_each_need(place: Path) -> None:
    document = json.loads(ok(*WORDS, "-o", "new", "--dry-run", "--json").out)
    assert not (place / "new").exists()
    work = [*document["rows"], *document["shared"]]
    assert len(work) == 15 + 5
    weights = (place / "base" / "model.safetensors").stat().st_size
    for row in work:
        assert row["state"] == "open"
        assert row["minutes"] >= 0
        assert row["memory_bytes"] > weights or row["minutes"] == 0
    minutes = {row["cell"].rpartition("-")[0]: row["minutes"] for row in document["rows"]}
    assert minutes["adaptive-random-s0"] > minutes["average-random-s0"] >= minutes["base"] > 0
    done = json.loads(ok(*WORDS, "-o", "calm", "--dry-run", "--json").out)
    assert {row["state"] for row in [*done["rows"], *done["shared"]]} == {"done"}


def test_the_mean_over_seeds_is_paired_with_each_control(place: Path) -> None:
    rows = {
        (row["system"], row["pool"]): row for row in json.loads(ok("study", "collect", "calm", "--json").out)["rows"]
    }
    answers: dict[tuple[str, str], dict[str, list[float]]] = {}
    for file in (place / "calm").glob("cells/*/result.json"):
        found = json.loads(file.read_text())
        for answer in found["answers"]:
            answers.setdefault((found["system"], found["pool"]), {}).setdefault(answer["id"], []).append(
                answer["value"]
            )
    means = {key: {id: sum(each) / len(each) for id, each in values.items()} for key, values in answers.items()}
    ours = rows["adaptive", "random"]
    assert (ours["seeds"], ours["n"]) == (2, 12)
    assert ours["value"] == pytest.approx(sum(means["adaptive", "random"].values()) / 12)
    for control, key in (("base", ("base", "")), ("target", ("target", "")), ("noise", ("adaptive", "noise"))):
        deltas = [means["adaptive", "random"][id] - means[key][id] for id in means[key]]
        assert ours[f"{control}_delta"] == pytest.approx(sum(deltas) / 12)
        assert ours[f"{control}_low"] <= ours[f"{control}_delta"] <= ours[f"{control}_high"]
    better = [id for id in means["base", ""] if means["adaptive", "random"][id] < means["base", ""][id]]
    assert ours["wins"] == len(better)
    assert rows["base", ""]["base_delta"] is None
    assert rows["adaptive", "noise"]["noise_delta"] is None


def test_a_notebook_gets_the_rows_of_the_command(place: Path) -> None:
    told = json.loads(ok("study", "collect", "calm", "--json").out)["rows"]
    with lora_cli.open_pool() as pool:
        rows = pool.study(
            data="task.jsonl", out="calm", systems="base,average,ties,adaptive,target", k=2, seeds=2, steps=4,
            target_steps=4, target_rank=2, metric="nll", batch_size=4,
        )  # fmt: skip
    assert rows == told
