"""Workers on this machine: as many as there are, dead or alive, the same study comes out."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from lora_cli.steps.study.folder import Outcome, StudyFolder, held
from lora_cli.steps.study.order import Order
from lora_cli.steps.study.plan import Cell
from tests.cli import lora, ok
from tests.small_study import WORDS, results

pytestmark = pytest.mark.usefixtures("one_thread")


def workers() -> list[int]:
    """The processes below this one that do cells."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes()
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == os.getpid() and b"lora_cli.executors.local" in words:
            found.append(int(folder.name))
    return found


@pytest.mark.slow
def test_two_workers_give_the_bytes_of_one(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    ok(*WORDS, "-o", "two", "--jobs", "2")
    assert results(place / "two") == results(place / "calm")
    assert workers() == []
    assert [*(tmp_path / "temporary").iterdir()] == []


@pytest.mark.slow
def test_a_worker_that_is_killed_is_replaced_and_its_cell_done_again(place: Path) -> None:
    """Both workers are killed as soon as they work on a cell."""
    killed: list[int] = []
    ended = threading.Event()

    def kill() -> None:
        while len(killed) < 2 and not ended.wait(0.02):
            if [*(place / "two").glob("cells/*")]:
                for process in workers():
                    if process not in killed:
                        os.kill(process, signal.SIGKILL)
                        killed.append(process)
                        break

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        ok(*WORDS, "-o", "two", "--jobs", "2")
    finally:
        ended.set()
        thread.join()
    assert len(killed) == 2
    assert results(place / "two") == results(place / "calm")


@pytest.mark.slow
def test_work_that_ends_every_worker_is_given_up_and_named(place: Path) -> None:
    folder = StudyFolder(place / "calm")
    cells = folder.study.cells()
    for cell in cells[:2]:
        (folder.cell(cell.name) / "result.json").unlink()
    lost = folder.cell(cells[0].name)

    def kill() -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and not (lost / "failed.json").exists():
            for process in workers():
                with suppress(ProcessLookupError):  # it may end between the two
                    if holds(process, lost):
                        os.kill(process, signal.SIGKILL)
            time.sleep(0.001)

    thread = threading.Thread(target=kill)
    thread.start()
    with held(lost):  # each worker waits in this cell until it is killed
        told = lora(*WORDS, "-o", "calm", "--jobs", "2")
    thread.join()
    assert told.code == 6
    assert f"1 cell of 15 failed, first {cells[0].name}: its worker died 2 times (signal 9)" in told.err
    assert "--jobs" in told.err
    told = lora("study", "collect", "calm")
    assert told.code == 6
    assert "1 cell of 15 not done, 1 of them failed" in told.err


def holds(process: int, folder: Path) -> bool:
    """Whether a process has a folder open."""
    try:
        links = [str(link.readlink()) for link in Path(f"/proc/{process}/fd").iterdir()]
    except OSError:
        return False
    return str(folder) in links


def test_needs_come_first_and_what_needs_a_failed_one_is_left_out(place: Path) -> None:
    folder = StudyFolder(place / "calm")
    study = folder.study
    cells = study.cells()
    for file in [*(place / "calm").glob("cells/*/result.json"), *(place / "calm").glob("shared/selection-*")]:
        file.unlink()
    order = Order(folder, cells)
    taken: list[str] = []
    ended: list[Outcome] = []
    while (name := order.take()) is not None:
        taken.append(name)
        failed = name.startswith("selection-s1")
        ended += order.ended(Outcome(name=name, error="no luck" if failed else ""))
    by_name: dict[str, Cell] = {cell.name: cell for cell in cells}
    for name in taken:
        if name in by_name:
            assert all(taken.index(need) < taken.index(name) for need in by_name[name].needs if need in taken)
    assert {one.name for one in ended} == {*by_name}
    lost = {one.name for one in ended if one.error}
    assert lost == {name for name, cell in by_name.items() if any(n.startswith("selection-s1") for n in cell.needs)}
    assert lost
    assert not lost & {*taken}


def test_a_plan_says_what_each_cell_needs(place: Path) -> None:
    rows = json.loads(ok(*WORDS, "-o", "new", "--dry-run", "--json").out)["rows"]
    needs = {row["cell"].rpartition("-")[0]: row["needs"] for row in rows}
    assert needs["base"] == []
    assert needs["adaptive-noise-s1"] == needs["adaptive-random-s1"], "noise replaces the same adapters"
    assert needs["average-relevant"] == needs["adaptive-relevant-s0"] == needs["adaptive-relevant-s1"]
    assert len({need for row in rows for need in row["needs"]}) == 5


@pytest.mark.parametrize(
    "module",
    ["executors.local", "executors._ray_driver", "steps.study.collect", "steps.study.report", "steps.study.workers"],
)
def test_who_only_reads_a_folder_does_not_import_what_computes(module: str) -> None:
    heavy = {"torch", "transformers", "peft", "cma", "lora_cli.steps.study.work", "lora_cli.steps.train.train"}
    code = f"import sys, lora_cli.{module}; assert not {heavy!r} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
