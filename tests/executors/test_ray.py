"""Workers on a real Ray cluster: the same study comes out, whatever becomes of workers and nodes."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.cli import ok, refused
from tests.paths import ROOT
from tests.small_study import WORDS, results

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed"),
]
RAY = (*WORDS, "--executor", "ray")


def processes(word: bytes) -> list[int]:
    """The processes whose command line has a word."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if word in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def at_work_in(folder: Path) -> list[int]:
    """The actors that hold a cell below `folder`."""
    found = []
    for process in processes(b"ray::RemoteWorker"):
        try:
            links = [str(link.readlink()) for link in Path(f"/proc/{process}/fd").iterdir()]
        except OSError:
            continue
        if any(link.startswith(f"{folder}/") for link in links):
            found.append(process)
    return found


@contextmanager
def cluster(hooks: Path, *nodes: str) -> Iterator[str]:
    """A head without cores and these nodes; yields the address. See tests/executors/ray_cluster.py."""
    hooks.mkdir()
    words = [sys.executable, "-m", "tests.executors.ray_cluster", str(hooks), *nodes]
    quiet = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    with (
        (hooks / "log").open("w") as log,
        subprocess.Popen(
            words, cwd=ROOT, env=quiet, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        ) as process,
    ):
        assert process.stdout is not None
        line = next((line for line in process.stdout if line.startswith("cluster ")), "")
        assert line, (hooks / "log").read_text()
        try:
            yield line.split()[1]
        finally:
            process.communicate()


@pytest.mark.slow
def test_a_worker_that_is_killed_in_a_cell_is_replaced_and_every_cell_is_there_once(place: Path) -> None:
    """On a cluster that is started for the study, and gone after it."""
    killed: list[int] = []

    def kill() -> None:
        deadline = time.monotonic() + 240
        while not killed and time.monotonic() < deadline:
            time.sleep(0.005)
            for process in at_work_in(place / "two" / "cells")[:1]:
                os.kill(process, signal.SIGKILL)
                killed.append(process)

    thread = threading.Thread(target=kill)
    thread.start()
    told = ok(*RAY, "-o", "two", "--jobs", "2", "--json")
    thread.join()
    assert killed
    assert json.loads(told.out)["done"] == 15, "stdout is the one document: Ray prints nothing there"
    assert "ray" not in told.err.lower().replace(str(place).lower(), "")
    assert results(place / "two") == results(place / "calm")
    assert [one for one in processes(b"ray::RemoteWorker") if one in killed] == []


@pytest.mark.slow
def test_nodes_that_cannot_work_are_named_and_the_others_go_on(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of three nodes cannot read the base, one does not see the study's folder."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")  # paths of its sockets are short
    with cluster(tmp_path / "hooks", "-", "place/base/", "place/two/") as address:
        told = ok(*RAY, "-o", "two", "--address", address)
        [base] = [line for line in told.err.splitlines() if "warning" in line and "place/base" in line]
        [folder] = [line for line in told.err.splitlines() if "warning" in line and "place/two" in line]
        assert "does nothing" in base
        assert "place/two is not the folder of the study here" in folder
        assert [*(tmp_path / "temporary").glob("lora-*")] == []
        assert results(place / "two") == results(place / "calm")


@pytest.mark.slow
def test_without_a_worker_that_can_work_nothing_is_lost(place: Path, tmp_path: Path) -> None:
    with cluster(tmp_path / "hooks", "place/base/") as address:
        error = refused(1, *RAY, "-o", "two", "--address", address)
    assert "no worker is left: worker 0 on " in error
    assert "run it again" in error


def test_an_address_that_nobody_answers(place: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    began = time.monotonic()
    error = refused(7, *RAY, "-o", "two", "--address", f"127.0.0.1:{port}")
    assert f"cannot join the Ray cluster at 127.0.0.1:{port}" in error
    assert time.monotonic() - began < 120


@pytest.mark.slow
def test_an_address_where_something_else_listens_is_given_up() -> None:
    patched = "from lora_cli.executors import _ray_driver as d; d._JOIN_WITHIN = 5; d._answer_failure"
    answer = "lambda kind, **said: print(json.dumps(said), flush=True)"
    code = f"{patched}; import json; d._joined(sys_address, {answer}, jobs=1)"
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        words = [sys.executable, "-c", code.replace("sys_address", repr(address))]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert json.loads(done.stdout)["type"] == "NetworkError"
    assert "no answer of a cluster in 5 s" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--executor", "ray", "--address", "ray://here:1"), "HOST:PORT"),
        (("--executor", "ray", "--address", "here"), "HOST:PORT"),
        (("--executor", "ray", "--address", "here:99999"), "HOST:PORT"),
        (("--executor", "ray", "--address", f"here:{'9' * 5000}"), "HOST:PORT"),
        (("--executor", "ray", "--gpus-per-worker", "inf"), "not inf"),
        (("--executor", "ray", "--gpus-per-worker", "0.5"), "computes on cpu"),
        (("--executor", "ray", "--gpus-per-worker", "1.5"), "not 1.5"),
        (("--address", "here:1"), "executor local takes no --address"),
        (("--executor", "slurm", "--gpus-per-worker", "1"), "executor slurm takes no --gpus-per-worker"),
    ],
)
def test_options_that_make_no_sense_are_refused(place: Path, words: tuple[str, ...], said: str) -> None:
    assert said in refused(2, *WORDS, "-o", "two", *words)
    assert (place / "two").exists() == (said == "computes on cpu")  # that alone is known when the study is planned


def test_without_ray_the_extra_is_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_cli.executors.ray.find_spec", lambda name: None)
    assert "lora-cli[ray]" in refused(2, *RAY, "-o", "two")
    assert not (place / "two").exists()
