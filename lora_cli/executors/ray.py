"""Cells on a Ray cluster: one that runs, or one that is started here and ends with the study.

Ray runs in a process of its own. It prints to stdout, its threads and signal handlers stay until the end, and it may
wait for minutes for an address that nobody answers, or abort when its cluster is lost.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lora_cli.errors import LoraError, NetworkError, OutputError, UsageError
from lora_cli.records import Progress, silent, unheard
from lora_cli.steps.study.folder import Outcome, Piece, WorkFolder
from lora_cli.text import shortened

_DRIVER = (
    "import json, sys; sys.path = json.loads(sys.argv[1]); from lora_cli.executors._ray_driver import main; main()"
)
_FAILURES = {kind.__name__: kind for kind in (LoraError, NetworkError, OutputError, UsageError)}
_PATIENCE = 20.0


def ray(
    folder: WorkFolder,
    cells: Sequence[Piece],
    *,
    jobs: int | None = None,
    progress: Progress = silent,
    warn: Callable[[str], None] = unheard,
    address: str | None = None,
    gpus_per_worker: float | None = None,
) -> Iterator[Outcome]:
    """Do the cells by actors of a Ray cluster, and yield the outcome of each that was not done before.

    Each actor is one worker with one core, which loads the base once. A worker that dies is replaced, and its work is
    done again; work that ends two workers fails. A worker that does not see the folder, has other versions of packages
    or cannot load the base is left out with a warning.

    Args:
        jobs: the number of workers; by default as many as the cluster has room for.
        address: HOST:PORT of the cluster; by default that in RAY_ADDRESS, else a cluster is started here.
        gpus_per_worker: GPUs of a worker, or the share of one; by default 1 on cuda, else 0.

    Raises:
        UsageError: the cluster has no room for a worker. NetworkError: nobody answers at the address.
        LoraError: no worker is left.
    """
    gpus = _gpus(folder, gpus_per_worker)
    request = {
        "folder": str(folder.path.absolute()),
        "cells": [[cell.name, [*cell.needs]] for cell in cells],
        "jobs": jobs,
        "gpus": gpus,
        "address": _named(address),
    }
    return _outcomes(request, progress, warn)


def demand(address: str | None = None, gpus_per_worker: float | None = None) -> None:
    """UsageError, with the extra to install, if Ray is not here, or for options that are wrong in every study."""
    if find_spec("ray") is None:
        raise UsageError("--executor ray needs Ray", hint="pip install 'lora-cli[ray]', or choose another --executor")
    if named := _named(address):
        host_and_port(named)
    asked = gpus_per_worker
    if asked is not None and not (0 < asked <= 1 or (asked > 1 and asked % 1 == 0)):
        raise UsageError(f"--gpus-per-worker is a share of a GPU, or a whole number of them, not {asked:g}")


def host_and_port(address: str) -> tuple[str, int]:
    """The two parts of a cluster's address. UsageError for anything else."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and len(port) <= 5 and int(port) < 1 << 16 and "//" not in host:
        return host.strip("[]"), int(port)
    raise UsageError(
        f"--address is HOST:PORT of the cluster's head, not {shortened(repr(address))}", hint="such as 10.0.0.1:6379"
    )


def _named(address: str | None) -> str:
    """The address of the cluster, "" for one that is started here."""
    return address or os.environ.get("RAY_ADDRESS") or ""


def _gpus(folder: WorkFolder, asked: float | None) -> float:
    """GPUs of a worker. UsageError for GPUs that nothing would use."""
    on_gpu = folder.device.startswith("cuda")
    if asked is None:
        return float(on_gpu)
    if not on_gpu:
        raise UsageError(f"--gpus-per-worker is for --device cuda: this study computes on {folder.device}")
    return asked


def _outcomes(request: Mapping[str, Any], progress: Progress, warn: Callable[[str], None]) -> Iterator[Outcome]:
    """Start the driver with a request, and yield the outcomes that it answers with, line by line."""
    places = json.dumps([str(Path(place).absolute()) for place in sys.path])
    driver = subprocess.Popen(
        [sys.executable, "-P", "-c", _DRIVER, places],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        env={**os.environ, "PYTHONUTF8": "1"},
        start_new_session=True,  # Ctrl-C is for this process, which ends the other
    )
    try:
        assert driver.stdin is not None
        assert driver.stdout is not None
        with suppress(BrokenPipeError):
            driver.stdin.write(json.dumps(request) + "\n")
            driver.stdin.flush()
        for line in driver.stdout:
            answer = json.loads(line)
            if answer["kind"] == "end":
                return
            yield from _told(answer, progress, warn)
        raise LoraError(
            f"the process that works with Ray ended (exit code {driver.wait()})",
            hint="the cluster may be lost; what is done is kept: run it again to go on",
        )
    finally:
        _end(driver)


def _told(answer: Mapping[str, Any], progress: Progress, warn: Callable[[str], None]) -> Iterator[Outcome]:
    """What one answer of the driver is. Raises the failure that it may be."""
    match answer["kind"]:
        case "outcome":
            yield Outcome(**answer["outcome"])
        case "progress":
            progress(*answer["progress"])
        case "warning":
            warn(answer["text"])
        case _:
            raise _FAILURES.get(answer["type"], LoraError)(answer["message"], hint=answer["hint"])


def _end(driver: "subprocess.Popen[str]") -> None:
    """End the driver by the end of its input, upon which it takes down what it started."""
    for pipe in (driver.stdin, driver.stdout):
        with suppress(OSError, ValueError):
            assert pipe is not None
            pipe.close()
    try:
        driver.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        driver.kill()
        driver.wait()
