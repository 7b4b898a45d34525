"""Cells on this machine: in this process, or in one process for each GPU or core."""

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from lora_cli.errors import LoraError
from lora_cli.records import Progress, silent, unheard
from lora_cli.steps.study.crew import Died, Unfit, together
from lora_cli.steps.study.folder import Outcome, Piece, WorkFolder
from lora_cli.steps.study.order import Order
from lora_cli.steps.study.workers import worker_in

_UNFIT = "unfit"
_WORKER = "import json, sys; sys.path = json.loads(sys.argv[1]); from lora_cli.executors.local import serve; serve()"


def local(
    folder: WorkFolder,
    cells: Sequence[Piece],
    *,
    jobs: int | None = None,
    progress: Progress = silent,
    warn: Callable[[str], None] = unheard,
) -> Iterator[Outcome]:
    """Do the cells by workers on this machine, and yield the outcome of each that was not done before.

    One worker is this process itself. A worker that dies is replaced, and its work is done again; work that ends two
    workers fails. Every worker ends with this process.

    Args:
        jobs: the number of workers; by default one per GPU, or per core without GPUs.
    """
    order = Order(folder, cells)
    count = len(order.cells)
    workers = min(jobs or _places(folder), count)
    progress("cells", 0, count)
    outcomes = _alone(folder, order) if workers <= 1 else _by_processes(folder, order, workers, warn)
    for done, outcome in enumerate(outcomes, 1):
        progress("cells", done, count)
        yield outcome


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _places(folder: WorkFolder) -> int:
    """The workers that this machine has room for."""
    if folder.device == "cuda":
        return _gpus()
    if folder.device != "cpu":
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _alone(folder: WorkFolder, order: Order) -> Iterator[Outcome]:
    with worker_in(folder.path) as worker:
        while (name := order.take()) is not None:
            yield from order.ended(worker.run(name))


def _by_processes(folder: WorkFolder, order: Order, workers: int, warn: Callable[[str], None]) -> Iterator[Outcome]:
    with tempfile.TemporaryDirectory(prefix="lora-study-") as home:  # workers that are killed tidy up nothing
        yield from together(order, [_Process(folder, number, home) for number in range(workers)], warn)


class _Process:
    """A worker in a process of its own, which is started when it is asked, and again when it has died."""

    def __init__(self, folder: WorkFolder, number: int, home: str) -> None:
        self._folder, self._number, self._home = folder, number, home
        self._process: subprocess.Popen[str] | None = None
        self._ended = False

    def ready(self, order: Order) -> bool:
        """True: it is started when it is asked."""
        return True

    def ask(self, name: str) -> Outcome:
        """Have it do some work. Died if it ends before it answers, Unfit if it can do none."""
        if self._ended:
            raise Died("stopped")
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(name + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except (OSError, ValueError):
            answer = ""
        if not answer:
            code = _ended(process)
            self._process = None
            raise Died(f"signal {-code}" if code < 0 else f"exit code {code}")
        found = json.loads(answer)
        if _UNFIT in found:
            raise Unfit(f"worker {self._number} does nothing more: {found[_UNFIT]}")
        return Outcome(**found)

    def end(self) -> None:
        """End the process; the end of its input ends it where it has not ended."""
        self._ended = True
        if self._process is not None:
            self._process.kill()
            _ended(self._process)

    def _start(self) -> "subprocess.Popen[str]":
        places = json.dumps([str(Path(place).absolute()) for place in sys.path])
        environment = {**os.environ, "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1", "TMPDIR": self._home}
        if self._folder.device == "cuda":
            known = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            ours = known if known != [""] else [str(place) for place in range(_gpus())]
            environment["CUDA_VISIBLE_DEVICES"] = ours[self._number % len(ours)]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _WORKER, places, str(self._folder.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            env=environment,
            start_new_session=True,  # Ctrl-C is for this process, which ends the others
        )
        return self._process


def _ended(process: "subprocess.Popen[str]") -> int:
    """The exit code of a process that ends now, whose pipes are closed."""
    code = process.wait()
    for pipe in (process.stdin, process.stdout):
        with suppress(OSError, ValueError):
            assert pipe is not None
            pipe.close()
    return code


def serve() -> None:
    """Do the work whose names come line by line on stdin, and answer each with its outcome on stdout."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    names: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(sys.stdin, names), daemon=True).start()
    with _told_if_unfit(answers), worker_in(Path(sys.argv[2])) as worker:
        worker.load()
        while True:
            outcome = worker.run(names.get())
            _answer(answers, {name: getattr(outcome, name) for name in outcome.__slots__})


@contextmanager
def _told_if_unfit(answers: IO[str]) -> Iterator[None]:
    """Say why a worker can do nothing, and end, where it cannot be made ready or cannot write the folder."""
    try:
        yield
    except LoraError as error:
        _answer(answers, {_UNFIT: error.message})
    except (MemoryError, OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        _answer(answers, {_UNFIT: f"{type(error).__name__}: {error}"})


def _answer(answers: IO[str], answer: Mapping[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def _listen(lines: IO[str], names: "queue.SimpleQueue[str]") -> None:
    """Pass lines on. Their end is that of the process that asks: nobody waits for what is under way."""
    for line in lines:
        names.put(line.rstrip("\n"))
    os._exit(1)
