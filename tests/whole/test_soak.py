"""Commands that are killed, crowded or out of disk end as if left in peace: a small part of tests/soak.py."""

import re
import subprocess
import sys

import pytest

from tests.paths import ROOT


@pytest.mark.slow
def test_a_disturbed_command_ends_as_an_undisturbed_one() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.soak", "12", "0", "1", "0"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()[-1]
    assert re.fullmatch(r"12 kills, 8 syncs at once, \d full disks, 0 faults of a Hub: nothing was lost", said), said
