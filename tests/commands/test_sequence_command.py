"""`lora study --sequence`: planned, done, shown and refused as a user types it."""

import json
from pathlib import Path

import pytest

from tests.cli import lora, ok, refused
from tests.steps.study.test_sequence import NAMES, task_files
from tests.tiny_bases import saved

TASKS = ",".join(f"{name}.jsonl" for name in NAMES)
TINY = ("--seeds", "2", "--target-rank", "4", "--target-steps", "4", "--metric", "nll", "--rules", "average,sequential")


@pytest.fixture(autouse=True)
def in_a_folder_with_tasks(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_BASE", str(saved(own_home / "tiny")))
    monkeypatch.setenv("LORA_DEVICE", "cpu")
    task_files(own_home)


def test_a_dry_run_lists_the_cells_and_writes_nothing() -> None:
    told = ok("study", "--sequence", TASKS, *TINY, "-o", "s", "--dry-run", "--json")
    document = json.loads(told.out)
    assert document["schema"] == "lora.sequence.plan/1"
    assert [row["rule"] for row in document["rows"]].count("alone") == 6
    assert len(document["rows"]) == 1 + 2 * (3 + 2 * 2)
    assert {row["state"] for row in document["rows"]} == {"open"}
    for row in document["rows"]:
        assert row["minutes"] > 0
        assert row["memory_bytes"] > 1e7
    assert "what is left takes about a second of one worker and" in told.err
    shards = [
        json.loads(ok("study", "--sequence", TASKS, *TINY, "-o", "s", "--dry-run", "--shard", f"{i}/4", "--json").out)
        for i in range(4)
    ]
    names = [{row["cell"] for row in shard["rows"]} for shard in shards]
    assert set[str]().union(*names) == {row["cell"] for row in document["rows"]}
    for shard in shards:
        assert {need for row in shard["rows"] for need in row["needs"]} <= {row["cell"] for row in shard["rows"]}
    assert not Path("s").exists()


@pytest.mark.slow
def test_it_is_done_by_two_workers_and_shown() -> None:
    told = ok("study", "--sequence", TASKS, *TINY, "-o", "s", "--jobs", "2", "--json")
    document = json.loads(told.out)
    assert [row["rule"] for row in document["rows"]] == ["average", "sequential"]
    assert {row["seeds"] for row in document["rows"]} == {2}
    assert (document["cells"], document["done"]) == (15, 15)
    table = json.loads(Path("s/table.json").read_text())
    for row in document["rows"]:
        mean = table["rules"][row["rule"]]["mean"]
        assert mean == {"a": document["a"][row["rule"]], **{name: row[name] for name in mean if name != "a"}}
    before = Path("s/table.json").read_bytes()
    again = ok("study", "--sequence", TASKS, *TINY, "-o", "s", "--jobs", "1")
    assert again.err == "study: 15 of 15 cells done, s/table.json, s/heat.png\n"
    assert [line.split("\t")[0] for line in again.out.splitlines()] == ["average", "sequential"]
    ok("study", "--sequence", TASKS, *TINY, "-o", "alone", "--jobs", "1")
    assert Path("alone/table.json").read_bytes() == before


@pytest.mark.slow
def test_shards_in_any_order_collected_twice_give_one_run_and_its_report() -> None:
    ok("study", "--sequence", TASKS, *TINY, "-o", "whole", "--jobs", "1")
    for i in (2, 0, 1):
        ok("study", "--sequence", TASKS, *TINY, "-o", f"part{i}", "--jobs", "1", "--shard", f"{i}/3")
    assert lora("study", "collect", "part0", "part1", "-o", "some").code == 6
    for order in (("part1", "part2", "part0"), ("part0", "part2", "part1")):
        ok("study", "collect", *order, "-o", "both")
        for name in ("table.json", "heat.png"):
            assert Path("both", name).read_bytes() == Path("whole", name).read_bytes()
    ok("study", "collect", "both")
    ok("study", "report", "both", "-o", "both.html")
    ok("study", "report", "whole", "-o", "whole.html")
    again = ok("study", "run", "whole", "--jobs", "1")
    assert [line.split("\t")[0] for line in again.out.splitlines()] == ["average", "sequential"]
    cell = next(Path("part1/cells").glob("sequential-s0-3-*"))
    (cell / "result.json").write_text((cell / "result.json").read_text().replace("lora.sequence.cell/1", "x"))
    assert "one cell with different results" in refused(1, "study", "collect", "whole", "part1", "-o", "new")
    assert not Path("new").exists()
    (cell / "result.json").unlink()
    (cell / "result.json").symlink_to(Path("whole/table.json").absolute())
    assert "links and pipes are not copied" in refused(1, "study", "collect", "part1", "-o", "new")
    Path("other").mkdir()
    assert "no folder of a sequence" in refused(1, "study", "collect", "whole", "other", "-o", "new")


@pytest.mark.slow
def test_a_cell_that_fails_is_named_and_the_others_go_on() -> None:
    rows = [json.loads(line) for line in Path("third.jsonl").read_text().splitlines()]
    rows[0]["prompt"] = "a" * 70  # longer than the base reads
    Path("third.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 1))
    failed = lora("study", "--sequence", TASKS, *TINY, "--seeds", "1", "-o", "s", "--jobs", "1")
    assert failed.code == 6
    assert "cells of 8 failed, first " in failed.err
    assert json.loads(Path("s/table.json").read_text())["missing"] != []


def test_a_study_file_names_the_tasks_beside_it(own_home: Path) -> None:
    (own_home / "below").mkdir()
    for name in NAMES:
        (own_home / f"{name}.jsonl").rename(own_home / "below" / f"{name}.jsonl")
    (own_home / "below/study.toml").write_text(
        f'sequence = {json.dumps([f"{name}.jsonl" for name in NAMES])}\nrules = "ties"\nseeds = 1\ntarget-rank = 4\n'
    )
    told = ok("study", "--file", "below/study.toml", "--dry-run", "--json")
    assert {row["rule"] for row in json.loads(told.out)["rows"]} == {"base", "alone", "ties"}
    (own_home / "below/study.toml").write_text("sequence = 3\n")
    assert "sequence takes names of files" in refused(2, "study", "--file", "below/study.toml", "--dry-run")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--sequence", "first.jsonl"), 2, "a sequence needs two tasks or more"),
        (("--sequence", "first.jsonl,first.jsonl"), 2, "--sequence has first.jsonl twice\n  each task"),
        (("--sequence", "first.jsonl,absent.jsonl"), 1, "no such file: absent.jsonl\n  a task file has one JSON"),
        (
            ("--sequence", TASKS, "--rules", "lego-9", "--target-rank", "4"),
            2,
            "from 1 to 8 here\n  two LoRAs of --target-rank 4",
        ),
        (("--sequence", TASKS, "--data", "first.jsonl"), 2, "--sequence takes no --data and no --test"),
        (("--sequence", TASKS, "--shard", "2/2"), 2, "--shard is I/N with I from 0 to N − 1"),
        (("--sequence", TASKS, "--pools", "random"), 2, "--sequence takes no --pools"),
        (("--sequence", TASKS, "-k", "3"), 2, "--sequence takes no -k"),
        (("--data", "first.jsonl", "--rules", "ties"), 2, "--rules and --sequence-test need --sequence"),
        (("--sequence", TASKS, "--rules", "orthgonal"), 2, "unknown rule 'orthgonal'"),
        (("--sequence", TASKS, "--sequence-test", "first.jsonl"), 2, "1 test file for 3 tasks"),
        (("--sequence", TASKS, "--seeds", "99999999"), 2, "cells, and a sequence has 2 to 1,000,000"),
    ],
)
def test_what_does_not_go_together_is_refused(words: tuple[str, ...], code: int, said: str) -> None:
    assert said in refused(code, "study", *words, "-o", "s")
    assert not Path("s").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("rules", ["../../outside"], "../../outside is no rule"),
        ("seeds", 10**8, "and a sequence has 2 to 1,000,000"),
        ("tasks", [{"name": "../secret", "train": "0", "test": "0"}] * 2, "../secret is no name of a task"),
    ],
)
def test_the_plan_of_a_stranger_leads_nowhere_else(key: str, value: object, said: str) -> None:
    ok("study", "--sequence", TASKS, *TINY, "--seeds", "1", "--rules", "average", "-o", "s", "--jobs", "1")
    plan = json.loads(Path("s/sequence.json").read_text())
    Path("s/sequence.json").write_text(json.dumps(plan | {key: value}))
    assert said in refused(1, "study", "--sequence", TASKS, *TINY, "-o", "s")
