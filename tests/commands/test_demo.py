"""`lora demo`: one table over the whole tool, and a folder in which the next commands work."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_cli.world import World
from tests.paths import ROOT

SPY = """
import socket

def noting(name, real):
    def note(*words, **options):
        with open({!r}, "a") as file:
            print(name, *words, file=file)
        return real(*words, **options)
    return note

socket.getaddrinfo = noting("getaddrinfo", socket.getaddrinfo)
socket.socket.connect = noting("connect", socket.socket.connect)
"""


def demo(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return command("demo", str(folder), "--size", "test", *options)


def command(*words: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lora_cli", *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.slow
def test_the_demo_shows_what_the_tool_is_for(tmp_path: Path) -> None:
    # Every process of the demo reads this at its start, and notes whatever would leave it, loopback or not.
    (tmp_path / "spy").mkdir()
    (tmp_path / "spy" / "sitecustomize.py").write_text(SPY.format(str(tmp_path / "spy" / "asked")))
    spied = {"PYTHONPATH": f"{tmp_path / 'spy'}{os.pathsep}{ROOT}"}
    asked = tmp_path / "spy" / "asked"
    probe = [sys.executable, "-c", "import socket; socket.create_connection(('127.0.0.1', 9))"]
    subprocess.run(probe, env=spied, check=False, capture_output=True)
    assert "127.0.0.1" in asked.read_text()
    asked.unlink()
    done = command("demo", str(tmp_path / "world"), "--size", "test", "--json", **spied)
    assert done.returncode == 0, done.stderr
    assert not asked.exists(), asked.read_text()
    rows = {row["system"]: row for row in json.loads(done.stdout)["rows"]}
    assert list(rows) == [
        "base",
        "average of 3 random",
        "TIES of 3 random",
        "adaptive, 3 random",
        "adaptive, 3 nearest",
        "new LoRA on the same data",
        "control: random weights",
    ]
    assert rows["base"]["value"] < 0.2
    assert rows["adaptive, 3 nearest"]["value"] > 0.7
    assert rows["adaptive, 3 nearest"]["low"] > rows["control: random weights"]["high"]
    assert all(row["low"] <= row["value"] <= row["high"] and row["n"] == 100 for row in rows.values())
    assert "the nearest adapters hold pool/kestrel/outer" in done.stderr
    assert "lora merge --method ties" in done.stderr
    settings = tmp_path / "world" / "lora.toml"
    assert settings.exists()

    # What another version made of this task is made again; what this one made is taken as it is.
    runs = tmp_path / "world" / "lora-runs" / "outer"
    record = json.loads((runs / "ties" / "run.json").read_text())
    (runs / "ties" / "run.json").write_text(json.dumps({**record, "key": "0" * 64}))
    fitted = (runs / "fit-nearest" / "run.json").stat().st_ino
    again = demo(tmp_path / "world", "--json")
    assert again.returncode == 0, again.stderr
    values = {row["system"]: row["value"] for row in json.loads(again.stdout)["rows"]}
    assert values == {name: row["value"] for name, row in rows.items()}
    assert json.loads((runs / "ties" / "run.json").read_text()) == record
    assert (runs / "fit-nearest" / "run.json").stat().st_ino == fitted

    other = demo(tmp_path / "world", "--seed", "1")
    assert (other.returncode, other.stdout) == (1, "")
    assert "name another folder" in other.stderr

    # Without test data an evaluation falls back to what the demo's last fit held out.
    settings.write_text("".join(line for line in settings.read_text().splitlines(True) if not line.startswith("test")))
    told = command("eval", cwd=settings.parent, LORA_DB="lora.db")
    assert told.returncode == 0, told.stderr
    assert "20 examples of task.jsonl (the validation part of the last fit)" in told.stderr


@pytest.mark.slow
def test_the_demo_runs_a_small_study(own_world: World) -> None:
    """The world is there already: the tour and the study are done on it."""
    done = demo(own_world.folder, "--study", "--json")
    assert done.returncode == 0, done.stderr
    rows = {(row["system"], row["pool"]): row for row in json.loads(done.stdout)["study"]}
    fitted = [("adaptive", pool) for pool in ("relevant", "random", "noise")]
    assert {("base", ""), ("target", ""), ("average", "random"), *fitted} <= rows.keys()
    assert rows["adaptive", "relevant"]["base_low"] > 0, "the pool holds an adapter of this task"
    assert rows["adaptive", "relevant"]["noise_low"] > 0
    assert all(row["n"] == 100 for row in rows.values())
    results = {file: file.stat().st_mtime_ns for file in own_world.folder.glob("lora-runs/study/cells/*/result.json")}
    assert len(results) == sum(row["seeds"] for row in rows.values())

    again = demo(own_world.folder, "--study")
    assert again.returncode == 0, again.stderr
    assert {file: file.stat().st_mtime_ns for file in results} == results, "a cell was done twice"
    shown = [line for line in again.stdout.splitlines() if line.startswith("adaptive\trelevant")]
    assert len(shown) == 1, again.stdout
