"""`lora study collect` beside another process, and into a folder of something else."""

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest

from lora_cli.errors import OutputError
from lora_cli.outputs import hold
from lora_cli.steps.study.collect import Collected, collect
from lora_cli.steps.study.folder import StudyFolder, held
from tests.cli import ok, refused
from tests.small_study import WORDS, results


def collected_beside(
    folder: Path, out: Path, other: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> Collected:
    """`folder` collected in `out` while somebody else, who was there before, does `other` in it."""
    waits = Event()

    def told(descriptor: int, *, without_locks: bool) -> bool:
        is_ours = hold(descriptor, without_locks=without_locks)
        if not is_ours:
            waits.set()
        return is_ours

    monkeypatch.setattr("lora_cli.steps.study.folder.hold", told)
    with ThreadPoolExecutor(1) as pool:
        with held(out):
            found = pool.submit(collect, [folder], out)
            assert waits.wait(60)
            other()
        return found.result()


def test_cells_that_another_collection_brings_meanwhile_are_compared(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree("calm", "twin")
    file = next((place / "twin").glob("cells/ties-relevant-*/result.json"))
    file.write_text(file.read_text().replace('"n": 12', '"n": 11'))
    with pytest.raises(OutputError, match="one cell with different results") as caught:
        collected_beside(
            place / "calm", place / "new", lambda: shutil.copytree("twin", "new", dirs_exist_ok=True), monkeypatch
        )
    assert str(place / "calm") in caught.value.message
    assert str(place / "new") in caught.value.message


def test_the_plan_that_another_collection_brings_meanwhile_is_kept(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ok(*WORDS, "--systems", "base,lorahub", "-o", "part", "--executor", "slurm")
    found = collected_beside(
        place / "part", place / "new", lambda: shutil.copytree("calm", "new", dirs_exist_ok=True), monkeypatch
    )
    both = {cell.name for folder in ("part", "calm") for cell in StudyFolder(place / folder).planned()}
    assert {cell.name for cell in StudyFolder(place / "new").planned()} == both
    assert (found.done, found.planned) == (15, len(both))
    assert results(place / "new") == results(place / "calm")


def test_a_folder_that_was_removed_while_it_was_awaited_is_made_again(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collected_beside(place / "calm", place / "new", (place / "new").rmdir, monkeypatch)
    assert results(place / "new") == results(place / "calm")


def test_a_folder_of_something_else_is_left_as_it_is(place: Path) -> None:
    before = sorted((place / "pool").rglob("*"))
    assert "pool exists, and is no study" in refused(1, "study", "collect", "calm", "-o", "pool")
    assert sorted((place / "pool").rglob("*")) == before
    (place / "empty").mkdir()
    assert "no folder of a study" in refused(1, "study", "collect", "calm", "empty", "-o", "new")
    assert not (place / "new").exists()
    ok("study", "collect", "calm", "-o", "empty")
