"""The process that works with Ray for the executor `ray`: it reads one request, and answers line by line."""

import json
import math
import os
import platform
import secrets
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, NamedTuple

from lora_cli.errors import LoraError, NetworkError, OutputError, UsageError
from lora_cli.executors.ray import host_and_port
from lora_cli.files import read_regular
from lora_cli.steps.study.crew import Died, Unfit, together
from lora_cli.steps.study.folder import Outcome
from lora_cli.steps.study.order import Order
from lora_cli.steps.study.workers import folder_in, worker_in

_ANSWER_WITHIN = 10.0
_JOIN_WITHIN = 60.0
_CLOSE_WITHIN = 10.0
"""Seconds for an address to answer, for Ray to join the cluster there, and for a worker to tidy up."""
_LEAST_STORE = 78_643_200
"""Bytes of Ray's smallest object store."""
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "error",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


class Task(NamedTuple):
    """A cell by its name, and what it needs."""

    name: str
    needs: tuple[str, ...]


class RemoteWorker:
    """A worker of the study, in the process of an actor."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def open(self, path: str, token: str) -> str:
        """Load the base for the study in the folder `path`, and say why that failed, if it did."""
        try:
            if not _readable(Path(path) / token):
                return f"{path} is not the folder of the study here: workers share it by a common file system"
            self._worker = worker_in(Path(path))
            self._stack.push(self._worker)  # it is closed even if it cannot be entered
            self._worker.__enter__()
            self._worker.load()
        except LoraError as error:
            return error.message
        except (MemoryError, OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def run(self, name: str) -> dict[str, Any]:
        """Do some work. OutputError where the folder cannot be written here."""
        outcome = self._worker.run(name)
        return {name: getattr(outcome, name) for name in outcome.__slots__}

    def place(self) -> str:
        """The name of the machine."""
        return platform.node()

    def close(self) -> None:
        """Remove what the worker has outside the study's folder."""
        self._stack.close()


def _readable(file: Path) -> bool:
    try:
        read_regular(file)
    except OSError:
        return False
    return True


class _Hand:
    """An actor, which is started when the work begins, and again when it has died."""

    def __init__(self, number: int, path: Path, token: str, resources: Mapping[str, float]) -> None:
        self._named, self._path, self._token, self._resources = f"worker {number}", str(path), token, resources
        self._actor: Any = None

    def ready(self, order: Order) -> bool:
        """Start the actor and wait until it has loaded the base; False where the work is over before."""
        import ray

        if self._actor is not None:
            return True
        self._actor = ray.remote(RemoteWorker).options(**self._resources, max_restarts=0).remote()
        place, opening = self._actor.place.remote(), self._actor.open.remote(self._path, self._token)
        while not ray.wait([opening], timeout=1.0)[0]:
            if order.over:
                return False
        try:
            self._named = f"{self._named.partition(' on ')[0]} on {ray.get(place)}"
            reason = ray.get(opening)
        except ray.exceptions.RayError as error:
            reason = _reason(error)
        if reason:
            raise Unfit(f"{self._named} does nothing: {reason}")
        return True

    def ask(self, name: str) -> Outcome:
        """Have it do some work. Died if its process ends before it answers; Unfit if it cannot write the folder."""
        import ray

        try:
            return Outcome(**ray.get(self._actor.run.remote(name)))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, OutputError):
                raise Unfit(f"{self._named} does nothing more: {error.cause.message}") from None
            self.end()
            raise Died(_reason(error)) from None
        except ray.exceptions.RayError as error:
            self.end()
            raise Died(_reason(error)) from None

    def end(self) -> None:
        """End the actor's process, after it has tidied up where it is free to."""
        import ray

        actor, self._actor = self._actor, None
        if actor is not None:
            ray.wait([actor.close.remote()], timeout=_CLOSE_WITHIN)
            ray.kill(actor)


def _reason(error: BaseException) -> str:
    """An error of Ray in one line: its first, or the last of a traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1] if "Traceback" in str(error) or "traceback" in str(error) else lines[0]


def main() -> None:
    """Do the work of one request, and answer with what becomes of it."""
    answers, errors = os.fdopen(os.dup(1), "w", encoding="utf-8"), os.dup(2)
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123
        os.dup2(nowhere.fileno(), 1)  # Ray prints what is no answer
        os.dup2(nowhere.fileno(), 2)
    lock = threading.Lock()

    def answer(kind: str, **values: Any) -> None:
        with lock:
            answers.write(json.dumps({"kind": kind, **values}) + "\n")
            answers.flush()

    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_listen, daemon=True).start()
    try:
        _work(request, answer)
        answer("end")
    except LoraError as error:
        _answer_failure(answer, error)
    except BaseException:
        os.dup2(errors, 2)  # a bug keeps its traceback
        raise


def _listen() -> None:
    """End with the process that asked: Ray takes down what a driver started when it is gone."""
    sys.stdin.read()
    os._exit(1)


def _work(request: Mapping[str, Any], answer: Callable[..., None]) -> None:
    """Join or start the cluster, and do the cells there."""
    path, gpus = Path(request["folder"]), request["gpus"]
    folder = folder_in(path)
    order = Order(folder, [Task(name, tuple(needs)) for name, needs in request["cells"]])
    count = len(order.cells)
    answer("progress", progress=["cells", 0, count])
    if not order.cells:
        return
    resources = {"num_cpus": 1, "num_gpus": gpus}
    room = _joined(request["address"], answer, jobs=request["jobs"])
    workers = min(_number(room, gpus, request["jobs"], answer), count)
    with _token_in(path) as token:
        hands = [_Hand(number, path, token, resources) for number in range(workers)]
        outcomes = together(order, hands, lambda text: answer("warning", text=text))
        for done, outcome in enumerate(outcomes, 1):
            answer("progress", progress=["cells", done, count])
            answer("outcome", outcome={name: getattr(outcome, name) for name in outcome.__slots__})
    import ray

    ray.shutdown()


@contextmanager
def _token_in(folder: Path) -> Iterator[str]:
    """The name of a new file in `folder`, by which a worker finds that it sees the same folder."""
    try:
        token = NamedTemporaryFile(dir=folder, prefix=".shared-")  # noqa: SIM115
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error.strerror})") from None
    with token:
        yield Path(token.name).name


def _joined(address: str, answer: Callable[..., None], *, jobs: int | None) -> Mapping[str, float]:
    """Join the cluster at an address, or start one for "", and return its resources.

    Raises:
        NetworkError: nobody answers there, or Ray cannot join it. UsageError: a malformed address.
    """
    os.environ.update({name: os.environ.get(name, value) for name, value in _QUIET.items()})
    started: dict[str, Any] = {}
    if address:
        _demand_answer(address)
    else:
        # Its ports are open to the network, and who may use them may run code: let that be this study alone.
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
        started = {"num_cpus": jobs, "include_dashboard": False, "object_store_memory": _LEAST_STORE}
    import ray

    alarm = threading.Timer(_JOIN_WITHIN, _give_up, (address, answer))
    if address:
        alarm.start()
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level="CRITICAL", **started)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise _not_joined(address, _reason(error.__cause__ or error)) from None
    finally:
        alarm.cancel()
    room: dict[str, float] = ray.cluster_resources()
    return room


def _demand_answer(address: str) -> None:
    """NetworkError where nobody listens at HOST:PORT: Ray itself would ask again for minutes."""
    try:
        socket.create_connection(host_and_port(address), timeout=_ANSWER_WITHIN).close()
    except OSError as error:
        raise _not_joined(address, str(error)) from None


def _give_up(address: str, answer: Callable[..., None]) -> None:
    _answer_failure(answer, _not_joined(address, f"no answer of a cluster in {_JOIN_WITHIN:.0f} s"))
    os._exit(1)


def _not_joined(address: str, why: str) -> NetworkError:
    if address:
        return NetworkError(
            f"cannot join the Ray cluster at {address}: {why}",
            hint="ray status shows whether it runs; join it from one of its own machines",
        )
    return NetworkError(
        f"cannot start a Ray cluster: {why}",
        hint="its sockets and logs are in the folder of RAY_TMPDIR, else TMPDIR, else /tmp, whose path has to be short",
    )


def _answer_failure(answer: Callable[..., None], error: LoraError) -> None:
    answer("failure", type=type(error).__name__, message=error.message, hint=error.hint)


def _number(room: Mapping[str, float], gpus: float, jobs: int | None, answer: Callable[..., None]) -> int:
    """The number of workers that are asked for, or that a cluster of these resources has room for."""
    most = int(min(room.get("CPU", 0), room.get("GPU", 0) / gpus if gpus else math.inf))
    needed = "one core" + (f" and {gpus:g} GPUs" if gpus else "")
    if not most and jobs is None:
        raise UsageError(
            f"the Ray cluster has no room for a worker: it needs {needed}",
            hint="--jobs N waits for a cluster that grows",
        )
    if not most:
        answer("warning", text=f"the Ray cluster has no room for a worker yet: it needs {needed}")
    return jobs or most
