"""`lora fit --objective` as a user types it: metrics, a command, seeds, controls, time limits and kills."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean, stdev

import pytest

from lora_cli.world import World
from tests.cli import ok, refused
from tests.commands.test_fit_commands import here, record
from tests.commands.test_fit_runs import TWO, contents
from tests.paths import ROOT

__all__ = ["here"]
pytestmark = pytest.mark.usefixtures("one_thread")
HUB = ("fit", *TWO, "--preset", "lorahub", "--l1", "0")


def number_of_exact(folder: str, task: str) -> float:
    rows = json.loads(ok("eval", folder, "--data", task, "--json").out)["rows"]
    return float(rows[1]["value"])


@pytest.fixture
def script(here: World) -> str:
    """A command that prints the negative square of the distance of a candidate's coefficients to (0.5, -0.25)."""
    text = (
        "import json, os, sys\n"
        "if not os.path.exists(sys.argv[1] + '/coefficients.json'):  # a new LoRA\n"
        "    sys.exit(print(-9))\n"
        "rows = list(json.load(open(sys.argv[1] + '/coefficients.json'))['values'].values())\n"
        "[a], [b] = [next((row[i] for row in rows if row[i] != [0.0]), [0.0]) for i in range(2)]\n"
        "print(-(a - 0.5) ** 2 - (b + 0.25) ** 2)\n"
    )
    Path("score.py").write_text(text)
    return f"'{sys.executable}' -S score.py {{}}"


def test_a_metric_is_raised_and_told_on_both_parts(here: World) -> None:
    told = ok(*HUB, "--objective", "exact", "--evaluations", "20", "--max-new-tokens", "8", "-o", "hub")
    found = record("hub")
    assert {found["settings"][name] for name in ("objective", "better")} == {"exact", "metric"}
    objective = found["results"]["objective"]
    assert (objective["name"], objective["better"]) == ("exact", "higher")
    start, best = objective["training"]["start"], objective["training"]["best"]
    assert best > start
    held = objective["validation"]
    words = f"fit: exact {start:.3f} → {best:.3f} on the training examples, {held['start']:.3f} → {held['best']:.3f} on"
    assert f"{words} those held out · validation loss " in told.err
    [base] = found["results"]["comparisons"]
    assert base["objective"]["value"] == held["start"]
    assert base["objective"]["difference"]["delta"] == pytest.approx(held["best"] - held["start"])
    assert f"the base, whose exact is {held['start']:.3f}: " in told.err
    # `lora eval` without test data takes the validation part of the last fit.
    Path("lora.toml").write_text(
        "".join(line for line in Path("lora.toml").read_text().splitlines(keepends=True) if not line.startswith("test"))
    )
    rows = json.loads(ok("eval", "hub", "--max-new-tokens", "8", "--json").out)["rows"]
    assert [row["value"] for row in rows] == pytest.approx([held["start"], held["best"]])
    rows = [json.loads(line) for line in Path("hub/trace.jsonl").read_text().splitlines()]
    assert rows[-1]["lowest_cost"] == pytest.approx(-best)
    assert [row["step"] for row in rows] == [0, 1 + 6, 1 + 12, 1 + 18, 20][: len(rows)]


def test_seeds_and_controls_are_compared_by_the_objective(here: World) -> None:
    options = ("--objective", "exact", "--evaluations", "20", "--max-new-tokens", "8", "--control", "random,target")
    told = ok(*HUB, *options, "--seeds", "2", "--plot", "hub.svg", "-o", "hub")
    results = record("hub")["results"]
    assert [one["against"] for one in results["comparisons"]] == ["base", "random", "target"]
    seeds = [one["objective"]["validation"]["best"] for one in results["seeds"]]
    assert seeds[0] == results["objective"]["validation"]["best"]
    assert f"exact of the fit {fmean(seeds):.3f} ± {stdev(seeds):.3f}; the folder is that of the first" in told.err
    assert "the target LoRA, whose exact is " in told.err
    assert Path("hub.svg").stat().st_size > 1000


def test_a_command_is_the_objective(here: World, script: str) -> None:
    options = ("--objective", script, "--better", "higher", "--evaluations", "40", "--control", "random,target")
    told = ok(*HUB, *options)  # the folder of all results does not exist yet
    folder = Path(told.out.strip())
    found = record(folder)
    assert found["settings"]["objective"] == script
    objective = found["results"]["objective"]
    assert objective["training"]["start"] == pytest.approx(-0.3125)
    assert objective["training"]["best"] > -0.02
    assert "validation" not in objective
    assert (
        f"fit: the command's number -0.312 → {objective['training']['best']:.3f}, higher is better · validation loss"
        in told.err
    )
    assert "beside the base: the command gives -0.312" in told.err
    values = {one["against"]: one["objective"] for one in found["results"]["comparisons"]}
    assert values["random"]["value"] > -0.02
    assert (values["target"]["value"], values["target"]["difference"]) == (-9, None)
    assert "up to date" in ok(*HUB, *options).err
    assert not list(folder.parent.glob(".*"))


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--objective", "exct"), 2, "did you mean 'exact'?"),
        (("--objective", "sh -c 'echo 1'"), 2, "say which of its numbers are better"),
        (("--objective", "no-such-program {}", "--better", "lower"), 2, "no program 'no-such-program'"),
        (("--objective", "sh -c 'echo", "--better", "lower"), 2, "No closing quotation"),
        (("--objective", "exact", "--better", "lower"), 2, "exact, nll have their own direction"),
        (("--objective", "exact", "--command-timeout", "1"), 2, "--command-timeout is for an --objective that is a"),
        (("--objective", "true", "--better", "lower", "--command-timeout", "0"), 2, "above 0, not 0"),
        (("--objective", "choice"), 1, "task.jsonl: no choices in 100 of 100 examples"),
        (("--objective", "sh -c 'echo why >&2; exit 4'", "--better", "lower"), 5, "ended with code 4: why"),
        (
            ("--objective", "sh -c 'sleep 9'", "--better", "lower", "--command-timeout", "0.01"),
            5,
            "takes more than 0.6 s",
        ),
        (("--objective", "sh -c 'yes flood'", "--better", "lower"), 5, "prints more than 67.1 MB: flood"),
        (("--objective", "sh -c 'yes flood >&2'", "--better", "lower"), 5, "prints more than 67.1 MB: flood"),
        (("--objective", "true", "--better", "lower"), 5, "printed '', not a number"),
        (("--objective", "echo 1e999", "--better", "lower"), 5, "is inf at the start"),
        (("--objective", "rm -r {}", "--better", "lower"), 5, "printed '', not a number"),
        (("--objective", "echo many", "--better", "lower"), 5, "printed 'many', not a number"),
        (("--objective", "echo nan", "--better", "lower"), 5, "is nan at the start"),
        (
            ("--objective", "echo 1", "--better", "lower"),
            5,
            "no evaluation lowers the number of the command, 1.000: the base",
        ),
    ],
)
def test_what_cannot_be_an_objective_is_one_clear_line(
    here: World, options: tuple[str, ...], code: int, said: str
) -> None:
    told = refused(code, *HUB, *options, "--evaluations", "3", "-o", "hub")
    assert said in told
    assert not Path("hub").exists()


def test_a_descent_takes_no_metric_and_names_the_presets_that_do(here: World) -> None:
    told = refused(2, "fit", *TWO, "--objective", "exact")
    assert "preset adaptive takes no --objective" in told
    assert "lorahub" in told
    assert "--objective is one of loss, entropy" in refused(2, "fit", "--preset", "adamerging", "--objective", "exact")


def test_a_dry_run_names_the_objective_and_runs_nothing(here: World, script: str) -> None:
    Path("score.py").unlink()
    plan = json.loads(ok(*HUB, "--objective", script, "--better", "higher", "--dry-run", "--json", "-o", "hub").out)
    assert (plan["objective"], plan["better"], plan["evaluations"]) == (script, "higher", 40)
    assert not Path("hub").exists()


def test_a_search_that_the_time_limit_stops_goes_on_to_the_same_bytes(here: World, script: str) -> None:
    common = (*HUB, "--objective", script, "--better", "higher", "--evaluations", "12")
    ok(*common, "-o", "whole")
    hurried = ("--time-limit", "1e-9", "-o", "stopped")
    assert "at evaluation 1 of 12, and no evaluation so far raises the number of the command" in refused(
        6, *common, *hurried
    )
    told = [refused(6, *common, *hurried) for _ in range(4)]
    assert Path("stopped").exists()
    assert record("stopped")["unfinished"] == "the fit of seed 0 at evaluation 5 of 12"
    assert "goes on from there" in told[-1] or "go on from there" in told[-1]
    ok(*common, "-o", "stopped")
    assert contents("stopped") == contents("whole")
    assert not list(here.folder.glob(".*"))


@pytest.mark.slow
def test_a_search_killed_again_and_again_ends_as_one_that_was_not(here: World, script: str) -> None:
    command = (*HUB, "--objective", script, "--better", "higher", "--evaluations", "12", "--control", "random", "-o")
    ok(*command, "whole")
    killed = 0
    for wanted in (1, 4, 9, 14):
        process = subprocess.Popen(
            [sys.executable, "-m", "lora_cli", *command, "killed"],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and evaluated(here.folder) < wanted:
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert killed >= 3
    ok(*command, "killed")
    assert contents("killed") == contents("whole")
    assert not list(here.folder.glob(".*"))


def evaluated(folder: Path) -> int:
    """The evaluations in all states."""
    found = 0
    for file in folder.glob(".fit-*.json"):
        try:
            found += len(json.loads(file.read_text())["values"])
        except FileNotFoundError:
            continue
    return found
