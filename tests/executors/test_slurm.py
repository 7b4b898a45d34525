"""Slurm's array script: what it runs, and that any path survives in it. Slurm itself is not needed."""

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.cli import ok, refused
from tests.small_study import WORDS, results

pytestmark = pytest.mark.usefixtures("one_thread")
AWKWARD = 'it\'s "a" $HOME; `ls` {x} %j \\ é'


def test_a_script_is_written_and_nothing_is_done(place: Path) -> None:
    told = json.loads(ok(*WORDS, "-o", AWKWARD, "--executor", "slurm", "--jobs", "4", "--json").out)
    folder = place / AWKWARD
    script = folder / "study.sbatch"
    assert told["tasks"] == 4
    assert shlex.split(told["submit"]) == ["sbatch", str(script)]
    assert shlex.split(told["collect"]) == ["lora", "study", "collect", str(folder)]
    lines = script.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "#!/bin/bash"
    assert "#SBATCH --array=0-3" in lines
    assert not [line for line in lines if "--gpus" in line], "this study computes on the CPU"
    assert not [line for line in lines if line.startswith("#") and "$HOME" in line], "sbatch expands no path"
    subprocess.run(["bash", "-n", script], check=True)
    assert not (folder / "cells").exists()


def test_by_default_each_cell_is_a_task(place: Path) -> None:
    assert json.loads(ok(*WORDS, "-o", "new", "--executor", "slurm", "--json").out)["tasks"] == 15
    assert ok(*WORDS, "-o", "new", "--executor", "slurm", "-q").out == f"sbatch {place}/new/study.sbatch\n"


@pytest.mark.slow
def test_its_tasks_give_the_bytes_of_a_study_at_once(place: Path, tmp_path: Path) -> None:
    """Tasks run from another folder, without settings: the planned folder has all they need."""
    submit = shlex.split(ok(*WORDS, "-o", AWKWARD, "--executor", "slurm", "--jobs", "2", "-q").out)
    for task in ("1", "0"):
        environment = {**os.environ, "SLURM_ARRAY_TASK_ID": task}
        done = subprocess.run(["bash", submit[1]], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert results(place / AWKWARD) == results(place / "calm")


def test_what_slurm_cannot_do_is_refused(place: Path) -> None:
    assert "makes the shards itself" in refused(2, *WORDS, "--executor", "slurm", "--shard", "0/2")


def test_a_sequence_has_a_task_for_each_rule_and_seed(place: Path) -> None:
    (place / "second.jsonl").write_bytes((place / "task.jsonl").read_bytes())
    sequence = ("study", "--sequence", "task.jsonl,second.jsonl", "--executor", "slurm", "--seeds", "2", "-o", "new")
    assert json.loads(ok(*sequence, "--rules", "ties,sequential", "--json").out)["tasks"] == 6
    assert f'study run {place}/new --shard "$SLURM_ARRAY_TASK_ID/6"' in (place / "new" / "study.sbatch").read_text()
