"""`lora` for lines of shell, forked from a process that has every library loaded: a command starts in no time.

python -m tests.warm SOCKET     the process that forks; `program` is the `lora` that asks it
"""

import json
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Never

from tests.paths import ROOT

# Standard library only, and as little of it as will do: this is what a command of the tests pays.
_CLIENT = """#!{python} -ISE
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({socket!r})
    asked = json.dumps({{"words": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}}).encode()
    socket.send_fds(server, [len(asked).to_bytes(4)], [0, 1, 2])
    server.sendall(asked)
    server.recv(4)
    answer = server.recv(4)
sys.exit(int.from_bytes(answer) if answer else 70)
"""


@contextmanager
def forking(folder: Path) -> Iterator[Path]:
    """The address of a server in `folder`, while it runs."""
    address = folder / "server"
    server = subprocess.Popen([sys.executable, "-m", "tests.warm", str(address)], cwd=ROOT, stdout=subprocess.PIPE)
    assert server.stdout is not None
    server.stdout.readline()
    try:
        yield address
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


@contextmanager
def program(folder: Path) -> Iterator[Path]:
    """The file of a `lora` in `folder`, while its server runs."""
    with forking(folder) as address:
        client = folder / "lora"
        client.write_text(_CLIENT.format(python=sys.executable, socket=str(address)))
        client.chmod(client.stat().st_mode | stat.S_IXUSR)
        yield client


class Started:
    """A command that a server forked: it works in `folder`, says nothing, and can be killed."""

    def __init__(self, address: Path, words: Sequence[str], folder: Path, environment: Mapping[str, str]) -> None:
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(str(address))
        asked = json.dumps({"words": words, "folder": str(folder), "environment": dict(environment)}).encode()
        with Path(os.devnull).open("r+b") as nothing:
            socket.send_fds(self._connection, [len(asked).to_bytes(4)], [nothing.fileno()] * 3)
        self._connection.sendall(asked)
        self._process = int.from_bytes(self._connection.recv(4))

    def has_ended(self) -> bool:
        return bool(select.select([self._connection], [], [], 0)[0])

    def kill(self) -> bool:
        """Kill it by SIGKILL; returns whether it had not ended."""
        with suppress(ProcessLookupError):
            os.kill(self._process, signal.SIGKILL)
        return self.code() is None

    def code(self) -> int | None:
        """The exit code once it has ended, None if it was killed."""
        with self._connection:
            answer = self._connection.recv(4)
        return int.from_bytes(answer) if answer else None


def load_libraries() -> None:
    """Import every library that a command may need."""
    import peft  # noqa: F401
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: F401

    import lora_cli.steps.evaluate.request
    import lora_cli.steps.fit.request
    import lora_cli.steps.merge.request
    import lora_cli.steps.pool.sync
    import lora_cli.steps.study.work
    import lora_cli.steps.train.request  # noqa: F401

    # A pool of threads does not survive a fork.
    torch.set_num_threads(1)


def run_command(words: Sequence[str]) -> int:
    """Run `lora` in this process; returns its exit code, 70 for a bug."""
    from lora_cli.app import app

    code = 70
    try:
        app(list(words), prog_name="lora")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _answer(connection: socket.socket) -> Never:
    size, streams, _, _ = socket.recv_fds(connection, 4, 3)
    asked = json.loads(connection.recv(int.from_bytes(size), socket.MSG_WAITALL))
    for place, stream in enumerate(streams):
        os.dup2(stream, place)
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["folder"])
    sys.argv = ["lora", *asked["words"]]
    connection.sendall(os.getpid().to_bytes(4))
    connection.sendall(run_command(asked["words"]).to_bytes(4))
    os._exit(0)


def main(address: str) -> None:
    """Answer until killed."""
    load_libraries()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen()
        print("ready", flush=True)
        while True:
            connection, _ = listening.accept()
            with connection:
                if os.fork() == 0:
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    listening.close()
                    _answer(connection)


if __name__ == "__main__":
    main(*sys.argv[1:])
