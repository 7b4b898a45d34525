"""The script for a GPU runs, at tiny sizes on the CPU."""

import subprocess
import sys

import pytest

from tests.paths import ROOT


@pytest.mark.slow
def test_the_table_of_a_gpu_is_made_on_a_cpu() -> None:
    command = [sys.executable, "-m", "tests.bench.gpu_table", "--device", "cpu", "--tiny"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "more than 1e-05 from the CPU in float64: none" in done.stdout
    for part in ("| ties |", "| cast |", "TIES of 3 adapters", "fit step", "--method ties`", "systems together"):
        assert part in done.stdout
