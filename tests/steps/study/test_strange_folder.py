"""A study folder from a stranger, or one edited by hand: one clear line, and nothing outside of it."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli import lora, ok, refused
from tests.small_study import SHORT, WORDS

Edit = Callable[[dict[str, Any]], object]


def edited(file: Path, edit: Edit) -> None:
    found = json.loads(file.read_text(encoding="utf-8"))
    edit(found)
    file.write_text(json.dumps(found), encoding="utf-8")


def climbing(plan: dict[str, Any]) -> None:
    plan["systems"]["../../../out"] = plan["systems"].pop("average")
    plan["grids"][0]["systems"] = ["../../../out"]


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (climbing, "a name has letters"),
        (lambda plan: plan["pools"].update({"a/b": {}}), "a name has letters"),
        (lambda plan: plan["grids"][0].update(systems=["nothing"]), "nothing is not defined"),
        (lambda plan: plan["systems"].pop("target"), "target is not defined"),
        (lambda plan: plan["grids"][0].update(seeds=10**8), "at most 1,000,000"),
        (lambda plan: plan["grids"][0].update(seeds=-1), ">= 1"),
        (lambda plan: plan["systems"]["ties"].update(options={"merge": {"method": 3}}), "not a study of lora"),
        (lambda plan: plan["pools"]["random"].update(select={"by": "nothing"}), "not a study of lora"),
    ],
)
def test_a_plan_that_lora_cannot_make_is_refused(place: Path, edit: Edit, said: str) -> None:
    edited(place / "calm" / "study.json", edit)
    told = refused(1, "study", "collect", "calm", "-o", "new")
    assert "calm/study.json" in told
    assert said in told
    assert not (place / "new").exists()


def test_more_cells_than_a_study_has_are_refused_before_they_are_listed(place: Path) -> None:
    told = refused(
        2, "study", "--data", "task.jsonl", *SHORT, "--systems", "target", "--seeds", "99999999", "-o", "new"
    )
    assert "at most 1,000,000" in told
    assert not (place / "new").exists()


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda result: result.pop("answers"), "not the result of this cell"),
        (lambda result: result.update(answers=[]), "not the result of this cell"),
        (lambda result: result["answers"][0].update(value="high"), "not the result of this cell"),
        (lambda result: result["answers"][0].update(id="another"), "answers other examples"),
    ],
)
def test_a_result_without_the_answers_of_the_study_is_named(place: Path, edit: Edit, said: str) -> None:
    file = next((place / "calm").glob("cells/ties-random-s0-*/result.json"))
    edited(file, edit)
    told = refused(1, "study", "collect", "calm")
    assert said in told
    assert f"cells/{file.parent.name}/result.json" in told


def test_nothing_outside_of_a_folder_is_collected(place: Path) -> None:
    secret = place / "secret"
    secret.mkdir()
    (secret / "key").write_text("private")
    cell = next((place / "calm").glob("cells/ties-random-s0-*"))
    for strange in (cell / "notes", place / "calm" / "shared" / "notes"):
        for target in (secret / "key", secret):
            strange.symlink_to(target)
            assert "links and pipes are not copied" in refused(1, "study", "collect", "calm", "-o", "new")
            strange.unlink()
        os.mkfifo(strange)
        assert "pipe" in refused(1, "study", "collect", "calm", "-o", "new")
        strange.unlink()
    copied = [file for file in (place / "new").rglob("*") if file.is_file() and file.read_bytes() == b"private"]
    assert not copied


def test_a_link_in_the_place_of_a_cell_or_of_a_file_is_not_followed(place: Path) -> None:
    cell = next((place / "calm").glob("cells/ties-random-s0-*"))
    cell.rename(place / "elsewhere")
    cell.symlink_to(place / "elsewhere")
    assert f"{cell}: neither a file nor a folder" in refused(1, "study", "collect", "calm", "-o", "new")
    assert "neither a file nor a folder" in refused(1, "study", "collect", "calm")
    cell.unlink()
    (place / "elsewhere").rename(cell)
    for name in ("cells", "shared", "train.jsonl"):
        (place / "calm" / name).rename(place / "elsewhere")
        (place / "calm" / name).symlink_to(place / "elsewhere")
        assert f"{name}: neither a file nor a folder" in refused(1, "study", "collect", "calm", "-o", "new"), name
        (place / "calm" / name).unlink()
        (place / "elsewhere").rename(place / "calm" / name)
    ok("study", "collect", "calm", "-o", "new")


def test_a_place_that_cannot_be_written_is_named(place: Path) -> None:
    (place / "file").write_text("mine")
    assert "file: cannot be written" in refused(1, "study", "collect", "calm", "-o", "file")
    assert (place / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["train.jsonl", "test.jsonl", "adapters.jsonl"])
def test_a_study_does_not_go_on_with_other_data_or_candidates(place: Path, name: str) -> None:
    file = place / "calm" / name
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    next((place / "calm").glob("cells/ties-random-s0-*/result.json")).unlink()
    assert f"{name} has changed since the study was planned" in refused(1, *WORDS, "-o", "calm", "--jobs", "1")


@pytest.mark.parametrize("adapters", [["/etc/passwd"], [], "x", [3]])
def test_a_selection_of_others_than_the_candidates_fails_its_cells(place: Path, adapters: object) -> None:
    for file in (place / "calm" / "shared").glob("selection-s0-*.json"):
        if not file.name.endswith("cost.json"):
            file.write_text(json.dumps({"adapters": adapters}))
    for cell in (place / "calm").glob("cells/ties-random-s0-*"):
        (cell / "result.json").unlink()
    told = lora(*WORDS, "-o", "calm", "--jobs", "1")
    assert told.code == 6, told
    assert "no selection of this study's candidates" in told.err
