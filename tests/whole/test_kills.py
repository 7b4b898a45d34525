"""Killed at a random point, `merge` leaves nothing half-written, and a rerun makes what an undisturbed run makes."""

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests import warm
from tests.adapters_on_disk import random_factors, write_adapter

MERGE = ("merge", "--method", "ties", "a", "b", "c")
SHAPES = {f"model.layers.{i}.mlp.up_proj": (512, 256) for i in range(24)}


def as_from_a_terminal() -> None:
    """Take back what a shell does to commands in the background: it makes them ignore Ctrl-C."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with warm.forking(tmp_path_factory.mktemp("warm")) as address:
        yield address


def moments() -> list[Callable[[Path], bool]]:
    """When to kill: at once, when the work has begun, at two random points of it, and near its end."""
    draw = random.Random(0)
    whole = sum((out + inn) * (4 + 5 + 6) * 4 for out, inn in SHAPES.values())

    def written(share: float) -> Callable[[Path], bool]:
        return lambda folder: any(
            file.stat().st_size > share * whole for file in folder.glob(".out.*.partial/*.safetensors")
        )

    return [
        lambda folder: True,
        lambda folder: any(folder.glob(".out.*.partial")),
        written(draw.uniform(0.1, 0.5)),
        written(draw.uniform(0.5, 0.9)),
        lambda folder: any(folder.glob(".out.*.partial/adapter_config.json")),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--force",)], ids=["new", "replace"])
def test_a_killed_merge_is_whole_or_absent(tmp_path: Path, server: Path, options: tuple[str, ...]) -> None:
    def start(out: str, *options: str) -> warm.Started:
        environment = {**os.environ, "LORA_DB": str(tmp_path / "lora.db")}
        return warm.Started(server, [*MERGE, "-o", out, *options], tmp_path, environment)

    for seed, name in enumerate("abc"):
        write_adapter(tmp_path / name, random_factors(SHAPES, 4 + seed, seed=seed))
    assert start("calm").code() == 0
    calm = contents(tmp_path / "calm")
    if options:
        assert start("out").code() == 0
    killed = 0
    for has_come in moments():
        merging = start("out", *options)
        while not merging.has_ended() and not _seen(has_come, tmp_path):
            time.sleep(0.001)
        killed += merging.kill()
        if (tmp_path / "out").exists():
            assert contents(tmp_path / "out") == calm
        with closing(sqlite3.connect(tmp_path / "lora.db")) as database:
            assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert killed >= 3
    assert start("out", *options).code() == 0
    assert contents(tmp_path / "out") == calm
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def _seen(has_come: Callable[[Path], bool], folder: Path) -> bool:
    try:
        return has_come(folder)
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_merge_that_is_told_to_end_cleans_up(tmp_path: Path, number: signal.Signals) -> None:
    for seed, name in enumerate("abc"):
        write_adapter(tmp_path / name, random_factors(SHAPES, 4 + seed, seed=seed))
    process = subprocess.Popen(
        [sys.executable, "-m", "lora_cli", *MERGE, "-o", "out"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "LORA_DB": str(tmp_path / "lora.db")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=as_from_a_terminal,
    )
    while process.poll() is None and not any(tmp_path.glob(".out.*.partial")):
        time.sleep(0.001)
    process.send_signal(number)
    said = process.communicate()[1]
    assert process.returncode == 128 + number
    assert (b"lora: interrupted\n  nothing half-written is left" in said) == (number == signal.SIGINT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "lora.db"]
    with closing(sqlite3.connect(tmp_path / "lora.db")) as database:
        assert database.execute("select status from runs").fetchall() == [("failed",)]


INTERRUPTED_IMPORT = """
import signal, sys
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                if {swallowed!r}:
                    raise ImportError("cannot load module more than once per process")
                raise
sys.meta_path.insert(0, Interrupting())
sys.argv = ["lora", "task", "show", "absent.jsonl"]
from lora_cli.__main__ import main
main()
"""


@pytest.mark.parametrize(
    ("name", "swallowed", "said"),
    [
        ("typer.main", False, ""),
        ("lora_cli.commands.task", False, "lora: interrupted\n  nothing was changed\n"),
        ("lora_cli.commands.task", True, "lora: interrupted\n  nothing was changed\n"),
    ],
)
def test_an_interrupt_during_an_import_is_no_other_error(name: str, swallowed: bool, said: str) -> None:
    code = INTERRUPTED_IMPORT.format(name=name, swallowed=swallowed)
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, preexec_fn=as_from_a_terminal
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", said)
