"""The report of a sequence: its numbers against float64 references, its order, its verdict, and what it refuses."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_cli.reports.sequence import sequence_page
from lora_cli.reports.sequence_markdown import sequence_markdown
from lora_cli.reports.study_facts import SequenceReport
from lora_cli.steps.study.folder import write_json
from lora_cli.steps.study.sequence.folder import CELL_SCHEMA, SequenceFolder
from lora_cli.steps.study.sequence.plan import Base, Cell, Plan, Stage, plan_text
from lora_cli.steps.study.sequence.report import sequence_report
from tests.cli import ok, refused
from tests.reports.reading import Read
from tests.reports.test_page import HOSTILE, shape

RULES = ("average", "lego-2", "sequential")
TASKS = ("first", "second", "third")
COUNTS = (12, 30, 18)
LEVELS = {"base": 0.05, "alone": 0.9, "average": 0.55, "lego-2": 0.6, "sequential": 0.3}


def plan(rules: tuple[str, ...] = RULES, text: str = "") -> Plan:
    return Plan(
        tasks=tuple(Stage(name=name, train=f"{i:064x}", test=f"{i + 9:064x}") for i, name in enumerate(TASKS)),
        rules=rules,
        seed=3,
        seeds=2,
        rank="auto",
        lora={"rank": 4, "alpha": 8.0},
        recipe={"steps": 10},
        evaluation={"metric": "exact", "max_new_tokens": 8, "batch_size": 4},
        shared={"versions": {"torch": f"2{text}"}, "base": {"device": "cpu", "dtype": "fp32", f"base:acme{text}": "a"}},
        base=Base(place="acme", aliases=(), device="cpu", dtype="fp32", prompting={}, license_policy="warn"),
    )


def values(cell: Cell, j: int) -> list[float]:
    """Right and wrong answers on task j by a cell: the level of its rule, less on other tasks than the newest."""
    draw = np.random.default_rng([cell.step, j, cell.seed, len(cell.rule)])
    level = LEVELS[cell.rule] * (1.0 if cell.rule in {"base", "alone"} or cell.step == j + 1 else 0.8)
    return [float(one) for one in draw.random(COUNTS[j]) < level]


def write(path: Path, planned: Plan, *, but: str = "nothing", text: str = "") -> SequenceFolder:
    """A folder with a result for every cell `but` those of one rule."""
    path.mkdir(parents=True)
    (path / "sequence.json").write_bytes(plan_text(planned))
    folder = SequenceFolder(path)
    for cell in planned.cells():
        tasks = {}
        for j, stage in enumerate(planned.tasks):
            found = values(cell, j)
            answers = [{"id": f"{text}{i}", "value": value, "text": text} for i, value in enumerate(found)]
            tasks[stage.name] = {"value": float(np.mean(found)), "n": len(found), "answers": answers}
        result = {"schema": CELL_SCHEMA, "cell": cell.name, "tasks": tasks, "outputs": {"a.safetensors": f"ef{text}"}}
        if cell.rule == but:
            write_json(folder.cell(cell.name) / "failed.json", {"cell": cell.name, "error": f"out of memory {text}"})
        else:
            write_json(folder.cell(cell.name) / "result.json", result)
            write_json(folder.cell(cell.name) / "cost.json", {"seconds": 1.5, "tokens": 100})
    return folder


def final(planned: Plan, rule: str) -> list[list[list[float]]]:
    """(seeds, tasks, examples) after the last task, of `alone` each on its own task."""
    runs = []
    for seed in planned.every_seed:
        row = planned.cells()[:1] if rule == "base" else planned.row(rule, seed)
        runs.append([values(row[j] if rule == "alone" else row[-1], j) for j in range(len(TASKS))])
    return runs


def score(planned: Plan, rule: str) -> float:
    return float(np.mean([[np.mean(task) for task in run] for run in final(planned, rule)]))


def test_scores_gains_and_measures_are_those_of_the_cells(tmp_path: Path) -> None:
    planned = plan()
    found = sequence_report(write(tmp_path / "s", planned))
    assert [row.system for row in found.rows] == ["base", "alone", *RULES]
    rows = {row.system: row for row in found.rows}
    for rule, row in rows.items():
        assert row.value == pytest.approx(score(planned, rule), rel=1e-12)
        assert row.low <= row.value <= row.high
        assert row.n == sum(COUNTS)
        by_seed = [np.mean([np.mean(task) for task in run]) for run in final(planned, rule)]
        assert [*row.by_seed] == pytest.approx(by_seed[: len(row.by_seed)], rel=1e-12)
        for control in ("base", "sequential", "alone"):
            if control != rule:
                gain = row.gains[control]  # type: ignore[index]
                assert gain.found.delta == pytest.approx(score(planned, rule) - score(planned, control), abs=1e-12)
                assert gain.found.low <= gain.found.delta <= gain.found.high
    for one in found.rules:
        for i in range(len(TASKS)):
            for j in range(len(TASKS)):
                expected = [np.mean(values(planned.row(one.rule, seed)[i], j)) for seed in planned.every_seed]
                assert one.a[i][j] == pytest.approx(np.mean(expected), rel=1e-12)
        assert one.measures["final"] == pytest.approx(rows[one.rule].by_seed, rel=1e-12)
    # Every cell took 1.5 s: a rule has the three LoRAs alone and two cells of its own.
    assert [rows[name].seconds for name in ("base", "alone", "average", "sequential")] == [1.5, 4.5, 7.5, 4.5]


def test_the_order_goes_by_the_final_score_with_the_gain_over_the_next(tmp_path: Path) -> None:
    planned = plan()
    found = sequence_report(write(tmp_path / "s", planned))
    assert [*found.order] == sorted(RULES, key=lambda rule: -score(planned, rule))
    rows = {row.system: row for row in found.rows}
    for rule, after in zip(found.order, found.order[1:], strict=False):
        gain = rows[rule].gains["next"].found.delta
        assert gain == pytest.approx(score(planned, rule) - score(planned, after), abs=1e-12)
    assert "next" not in rows[found.order[-1]].gains


def test_the_verdict_is_by_the_rules_of_the_docs(tmp_path: Path) -> None:
    found = sequence_report(write(tmp_path / "s", plan()))
    assert [one.outcome for one in found.verdict.answers] == ["better", "better", "worse"]
    less = "Merging keeps more here than training one LoRA on, but less than a LoRA for each task."
    assert found.verdict.summary == less
    open_one = sequence_report(write(tmp_path / "without", plan(("average",))))
    assert [one.outcome for one in open_one.verdict.answers] == ["better", "missing", "worse"]
    assert "add sequential to --rules" in open_one.verdict.answers[1].found
    nothing = sequence_report(write(tmp_path / "nothing", plan(("sequential",))))
    assert nothing.verdict.answers == ()
    assert nothing.verdict.summary.startswith("Nothing was merged")


def swapped(levels: Mapping[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, level in levels.items():
        monkeypatch.setitem(LEVELS, name, level)


@pytest.mark.parametrize(
    ("levels", "outcomes", "said"),
    [
        ({"base": 0.99, "average": 0.3, "lego-2": 0.2}, ["worse"], "Merging does harm here"),
        ({"base": 0.5, "average": 0.6, "lego-2": 0.6}, ["open"], "No merge is shown to be better than the base."),
        ({"sequential": 1.0, "average": 0.4, "lego-2": 0.4}, ["better", "worse"], "training one LoRA on is better"),
        ({"sequential": 0.68}, ["better", "open"], "not shown to keep more than training one LoRA on"),
    ],
)
def test_every_sentence_has_its_case(
    levels: Mapping[str, float], outcomes: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swapped(levels, monkeypatch)
    found = sequence_report(write(tmp_path / "s", plan()))
    assert [one.outcome for one in found.verdict.answers][: len(outcomes)] == outcomes
    assert said in found.verdict.summary


def test_page_markdown_and_json_show_it_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "s", plan(), but="lego-2")
    found = sequence_report(folder)
    read = Read(sequence_page(found))
    told = " ".join(read.texts)
    for answer in found.verdict.answers:
        assert answer.found in told
    assert found.verdict.summary in told
    for text in ("after third", "out of memory", "4 failed", "Order of the rules", "(t − 1)/t and 1/t", "Base"):
        assert text in told, text
    tiles = [given for tag, given in read.elements if tag == "rect" and "fill-opacity" in given]
    assert len(tiles) == 2 * 9
    assert "script-src 'none'; " in read.policy
    assert sequence_page(found) == sequence_page(sequence_report(SequenceFolder(folder.path)))
    short = sequence_markdown(found)
    assert short.startswith(f"**{found.verdict.summary}**")
    assert "Failed: lego-2-s3-2-" in short
    monkeypatch.chdir(tmp_path)
    document: dict[str, Any] = json.loads(ok("study", "report", "s", "--json").out)
    assert document["schema"] == "lora.sequence.report/1"
    assert (document["cells"], document["done"]) == (19, 15)
    assert [row["system"] for row in document["order"]] == ["average", "sequential"]
    assert document["rules"][0]["a"] == [[*row] for row in found.rules[0].a]
    assert ok("study", "report", "s", "--markdown").out == short


@pytest.mark.parametrize("text", [text for text in HOSTILE if text.isprintable() or "\x00" in text])
def test_a_hostile_text_is_text_wherever_it_stands(text: str, tmp_path: Path) -> None:
    def report(name: str, given: str) -> SequenceReport:
        return sequence_report(write(tmp_path / name, plan(text=given), but="lego-2", text=given))

    read, calm = Read(sequence_page(report("hostile", text))), Read(sequence_page(report("calm", "x")))
    assert shape(read) == shape(calm)
    assert read.others == []


def test_damaged_and_absent_results_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path / "s", plan())
    shutil.copytree(tmp_path / "s", tmp_path / "none")
    shutil.rmtree(tmp_path / "none" / "cells")
    assert "no rule of this sequence is done by any seed" in refused(3, "study", "report", "none", "--markdown")
    cell = folder.plan.row("average", 3)[-1]
    for damaged in ('{"schema": "x"}', json.dumps({"schema": CELL_SCHEMA, "cell": cell.name, "tasks": {}})):
        (folder.cell(cell.name) / "result.json").write_text(damaged)
        assert f"{cell.name}/result.json: not the result of this cell" in refused(
            1, "study", "report", "s", "--markdown"
        )
