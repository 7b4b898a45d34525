"""Killed at a random point, `merge` leaves nothing half-written, and a rerun makes what an undisturbed run makes."""

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from tests.adapters_on_disk import random_factors, write_adapter

SHAPES = {f"model.layers.{i}.mlp.up_proj": (512, 256) for i in range(24)}


def start(folder: Path, out: str, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "lora_cli", "merge", "--method", "ties", "a", "b", "c", "-o", out, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LORA_DB": str(folder / "lora.db")}
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("options", [(), ("--force",)], ids=["new", "replace"])
def test_a_killed_merge_is_whole_or_absent(tmp_path: Path, options: tuple[str, ...]) -> None:
    for seed, name in enumerate("abc"):
        write_adapter(tmp_path / name, random_factors(SHAPES, 4 + seed, seed=seed))
    begin = time.monotonic()
    assert start(tmp_path, "calm").wait() == 0
    takes = time.monotonic() - begin
    calm = contents(tmp_path / "calm")
    if options:
        assert start(tmp_path, "out").wait() == 0
    moments = random.Random(0)
    killed = 0
    for _ in range(5):
        process = start(tmp_path, "out", *options)
        time.sleep(takes * moments.uniform(0.4, 1.0))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        if (tmp_path / "out").exists():
            assert contents(tmp_path / "out") == calm
        with closing(sqlite3.connect(tmp_path / "lora.db")) as database:
            assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert killed >= 2
    assert start(tmp_path, "out", *options).wait() == 0
    assert contents(tmp_path / "out") == calm
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
