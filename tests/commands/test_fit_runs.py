"""Fits of several seeds, fits that stop at a time limit, and fits that are killed, as a user runs them."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path
from statistics import fmean, stdev

import pytest

from lora_cli.world import World
from tests.cli import lora, ok, refused
from tests.commands.test_fit_commands import here, record
from tests.paths import ROOT

__all__ = ["here"]
pytestmark = pytest.mark.usefixtures("one_thread")
TWO = ("pool/kestrel/outer", "pool/tarn/mirror")


def contents(folder: str) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def test_every_control_by_name_has_its_sentence(here: World) -> None:
    told = ok("fit", *TWO, "--steps", "10", "--control", "base, random,random-pooled", "-o", "fitted")
    found = {one["against"]: one["loss"] for one in record("fitted")["results"]["comparisons"]}
    assert list(found) == ["base", "random", "random-pooled"]
    assert found["random"] != found["random-pooled"]
    sentences = [line for line in told.err.splitlines() if ", whose loss is " in line]
    assert [sentence.partition(", whose loss is ")[0].rpartition("the ")[2] for sentence in sentences] == [
        "base", "random-LoRA control", "pooled random-LoRA control",
    ]  # fmt: skip
    assert record("fitted")["settings"]["controls"] == ["random", "random-pooled"]
    again = ok("fit", *TWO, "--steps", "10", "--control", "random,random-pooled", "-o", "fitted")
    assert "up to date" in again.err


def test_several_seeds_are_the_fits_of_each_and_the_first_is_written(here: World) -> None:
    common = ("fit", *TWO, "--steps", "10", "--control", "random")
    alone = {}
    for seed in (3, 4):
        ok(*common, "--seed", str(seed), "-o", f"seed{seed}")
        alone[seed] = record(f"seed{seed}")["results"]
    # The better one is not the first: what is written must not be the best of several.
    assert alone[4]["loss"] < 0.9 * alone[3]["loss"]
    told = ok(*common, "--seed", "3", "--seeds", "2", "-o", "both")
    results = record("both")["results"]
    assert results.pop("seeds") == [
        {
            "seed": seed,
            "loss": one["loss"],
            "best_step": one["best_step"],
            "others": {other["against"]: other["loss"] for other in one["comparisons"]},
        }
        for seed, one in alone.items()
    ]
    assert results == alone[3]
    for name in ("adapter_model.safetensors", "coefficients.json", "trace.jsonl"):
        assert contents("both")[name] == contents("seed3")[name]
    ours = [one["loss"] for one in alone.values()]
    theirs = [one["comparisons"][1]["loss"] for one in alone.values()]
    gains = [other - own for own, other in zip(ours, theirs, strict=True)]
    about = {name: f"{fmean(x):.3f} ± {stdev(x):.3f}" for name, x in (("fit", ours), ("it", theirs), ("gain", gains))}
    assert f"over 2 seeds (mean ± standard deviation): fit {about['fit']}; the folder is that of the first" in told.err
    assert f"the random-LoRA control {about['it']}, gain of the fit over it {about['gain']}" in told.err


def test_steps_of_fewer_examples_than_asked_for_are_said(here: World) -> None:
    lines = Path("task.jsonl").read_text().splitlines(keepends=True)
    Path("five.jsonl").write_text("".join(lines[:5]))
    common = ("--data", "five.jsonl", "--steps", "4")
    note = "note: a step reads 4 examples, all that are learnt from, not 16\n"
    assert note in ok("fit", *TWO, *common, "--batch", "16", "-o", "fitted").err
    assert record("fitted")["settings"]["batch"] == 4
    assert "up to date" in ok("fit", *TWO, *common, "--batch", "4", "-o", "fitted").err
    assert note in ok("train", *common, "--rank", "2", "--batch", "16", "-o", "trained").err
    # Nobody asked for the default of 8.
    told = ok("fit", *TWO, *common, "-o", "fitted")
    assert "up to date" in told.err
    assert "note: a step" not in told.err
    assert "note: a step" not in ok("fit", *TWO, *common, "--batch", "4", "-o", "other").err
    assert "note: a step" not in ok("fit", *TWO, *common, "--valid", "task.jsonl", "--batch", "5", "-o", "valid").err


def test_a_fit_that_the_time_limit_stops_says_so_and_goes_on_to_the_same_bytes(here: World) -> None:
    # From an average, even the first step has something to write.
    common = ("fit", *TWO, "--steps", "3", "--init", "average", "--control", "random")
    ok(*common, "-o", "whole")
    hurried = ("--time-limit", "1e-9", "-o", "stopped")
    told = refused(6, *common, *hurried)
    assert "stopped: the time limit came in the fit of seed 0 at step 1 of 3" in told
    assert "best so far, of step 0" in told
    assert "run the same command again to go on from there" in told
    assert record("stopped")["unfinished"] == "the fit of seed 0 at step 1 of 3"
    assert [one["against"] for one in record("stopped")["results"]["comparisons"]] == ["base"]
    assert contents("stopped")["adapter_model.safetensors"]
    assert json.loads(ok("runs", "list", "--json").out)["rows"][0]["status"] == "failed"
    where = [refused(6, *common, *hurried).partition("came in ")[2].partition(";")[0] for _ in range(3)]
    assert where == [
        "the fit of seed 0 at step 2 of 3",
        "the control random of seed 0 at step 1 of 3",
        "the control random of seed 0 at step 2 of 3",
    ]
    Path("stopped/README.md").write_text("mine")
    assert "adapter_model.safetensors" in contents("stopped")
    assert "up to date" not in ok(*common, "--time-limit", "60", "-o", "stopped").err
    assert contents("stopped") == contents("whole")
    assert not list(here.folder.glob(".*"))
    # As after a kill before the last state was removed.
    Path(f".fit-{record('whole')['key'][:16]}-0-fit.npz").write_bytes(b"left")
    assert "up to date" in ok(*common, *hurried).err
    assert not list(here.folder.glob(".*"))


def test_a_stopped_fit_begins_anew_without_resume(here: World) -> None:
    common = ("fit", *TWO, "--steps", "6", "-o", "stopped", "--time-limit", "1e-9")
    places = [refused(6, *common, *words).partition("the time limit came at ")[2].partition(",")[0]
              for words in ((), ("--resume",), ("--no-resume",), ())]  # fmt: skip
    assert places == ["step 1 of 6", "step 2 of 6", "step 1 of 6", "step 2 of 6"]


def test_a_time_limit_before_any_gain_writes_nothing(here: World) -> None:
    told = refused(6, "fit", *TWO, "--time-limit", "1e-9", "-o", "stopped")
    assert "the time limit came at step 1 of 100, and no step so far lowers the validation loss" in told
    assert not Path("stopped").exists()
    assert len(list(here.folder.glob(".fit-*.npz"))) == 1


def test_a_stopped_result_that_was_changed_is_not_replaced(here: World) -> None:
    common = ("fit", *TWO, "--steps", "3", "--init", "average", "-o", "stopped")
    refused(6, *common, "--time-limit", "1e-9")
    Path("stopped/adapter_model.safetensors").write_bytes(b"mine")
    assert "has changed since it was written" in refused(1, *common)


@pytest.mark.parametrize(
    "words",
    [("--time-limit", "0"), ("--time-limit", "-3"), ("--time-limit", "inf"), ("--seeds", "0"), ("--control", "bas")],
)
def test_options_out_of_range_are_usage_errors(here: World, words: tuple[str, str]) -> None:
    assert lora("fit", *words)[0] == 2


def test_layers_computed_again_do_not_change_a_result(here: World) -> None:
    ok("fit", *TWO, "--steps", "5", "-o", "kept")
    ok("fit", *TWO, "--steps", "5", "--grad-checkpointing", "-o", "again")
    assert contents("kept") == contents("again")


def states(folder: Path) -> set[int]:
    """The times at which states of a fit were written; a state may go while it is looked at."""
    found = set()
    for file in folder.glob(".fit-*.npz"):
        with suppress(FileNotFoundError):
            found.add(file.stat().st_mtime_ns)
    return found


@pytest.mark.slow
def test_a_fit_killed_again_and_again_ends_as_one_that_was_not(here: World) -> None:
    """Killed at the start, at a first state, in the middle of the fit, and in its control."""
    command = ("fit", *TWO, "--steps", "100", "--control", "random", "-o")
    ok(*command, "whole")
    killed = 0
    for wanted in (0, 1, 5, 9):
        process = subprocess.Popen(
            [sys.executable, "-m", "lora_cli", *command, "killed"],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        assert process.stderr is not None
        while b"split 80/20" not in process.stderr.readline():
            assert process.poll() is None
        before = states(here.folder)
        seen: set[int] = set()
        while len(seen - before) < wanted and process.poll() is None:
            seen |= states(here.folder)
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        process.stderr.close()
        if Path("killed").exists():
            assert contents("killed") == contents("whole")
        with closing(sqlite3.connect("lora.db")) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert killed >= 3
    ok(*command, "killed")
    assert contents("killed") == contents("whole")
    steps = [json.loads(line)["step"] for line in contents("killed")["trace.jsonl"].splitlines()]
    assert steps == [*range(101)]
    assert not list(here.folder.glob(".*"))
