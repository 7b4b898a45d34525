"""The user's own command as the objective of a search: it gets a candidate as a PEFT folder and prints a number."""

import contextlib
import math
import os
import shlex
import shutil
import signal
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from lora_cli.errors import Refused, UsageError
from lora_cli.metrics import METRICS
from lora_cli.text import duration, nearest, shortened, size

CANDIDATE = "LORA_CANDIDATE"
"""The variable of the environment in which a command finds the candidate's folder."""
PLACE = "{}"
"""What stands for the candidate's folder in the words of a command."""
_MOST_KEPT, _MOST_OUTPUT = 1 << 20, 64 << 20
"""Bytes of the end of an output that are kept, and bytes at which reading ends."""
_LINES_SHOWN = 5
_BLOCK, _PATIENCE = 1 << 16, 5.0
"""Bytes read at once, and seconds in which the last of them come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A program and its arguments, quoted as in a shell, which does not run.

    seconds: the time that it may take; it and its children are killed then.

    Raises UsageError for a command that ends inside quotes, an empty one, or a program that is not there.
    """

    text: str
    seconds: float = math.inf

    def __post_init__(self) -> None:
        words = self.words
        if not words:
            raise UsageError("--objective is empty", hint=_OTHERS)
        if shutil.which(words[0]) is None:
            hint = nearest(words[0], METRICS.methods, _OTHERS)
            raise UsageError(f"--objective {shortened(self.text)}: no program {shortened(words[0])!r}", hint=hint)

    @property
    def words(self) -> list[str]:
        """The program and its arguments."""
        try:
            return shlex.split(self.text)
        except ValueError as error:
            raise UsageError(f"--objective {shortened(self.text)}: {error}", hint="close the quotes") from None

    def number(self, folder: Path) -> float:
        """The number in the last line that the command prints about the adapter in `folder`; it may be NaN.

        Raises:
            Refused: the command cannot be run, fails, takes too long, prints no number, or without end.
        """
        called = f"the objective {shortened(self.text)}"
        code, out, err = self._run(folder, called)
        said, complaint = _last(out, 1), _last(err, _LINES_SHOWN)
        if code:
            why = f"by signal {-code}" if code < 0 else f"with code {code}"
            raise Refused(f"{called} ended {why}: {complaint or said or 'it said nothing'}", hint=_GOES_ON)
        try:
            return float(said)
        except ValueError:
            more = f"; on stderr: {complaint}" if complaint else ""
            raise Refused(
                f"{called} printed {said!r}, not a number{more}", hint=f"in its last line; {_GOES_ON}"
            ) from None

    def _run(self, folder: Path, called: str) -> tuple[int, bytes, bytes]:
        """The code with which the command ends, and the ends of what it prints to stdout and stderr.

        What it started in the background ends with it.
        """
        words = [word.replace(PLACE, str(folder)) for word in self.words]
        environment = {**os.environ, CANDIDATE: str(folder)}
        try:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            raise Refused(f"{called} cannot be run: {error.strerror}", hint="a pipe needs sh -c '…'") from None
        assert process.stdout is not None
        assert process.stderr is not None
        out, err = _Tail(process.stdout), _Tail(process.stderr)
        timed_out = False
        try:
            process.wait(timeout=None if math.isinf(self.seconds) else self.seconds)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            # Also where it is interrupted.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if flooded := next((one for one in (out, err) if one.flooded), None):
            raise Refused(
                f"{called} prints more than {size(_MOST_OUTPUT)}: {_last(flooded.bytes(), 1)}",
                hint=f"it has to print a number and end; {_GOES_ON}",
            )
        if timed_out:
            complaint = _last(err.bytes(), _LINES_SHOWN)
            raise Refused(
                f"{called} takes more than {duration(self.seconds)}" + (f": {complaint}" if complaint else ""),
                hint=f"raise --command-timeout; {_GOES_ON}",
            )
        return process.returncode, out.bytes(), err.bytes()


_OTHERS = f"one of {', '.join(METRICS.methods)}, or a command that prints a number"
_GOES_ON = "the evaluations so far are kept, and the same lora command goes on from there"


class _Tail:
    """The end of what comes through a pipe, which is read as it comes.

    A command that prints too much is `flooded`: the pipe is closed, and its next write fails.
    """

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe, self._kept = pipe, bytearray()
        self.flooded = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        total = 0
        with self._pipe:
            while not self.flooded and (block := os.read(self._pipe.fileno(), _BLOCK)):
                self._kept += block
                total += len(block)
                self.flooded = total > _MOST_OUTPUT
                if len(self._kept) > 2 * _MOST_KEPT:
                    del self._kept[:-_MOST_KEPT]

    def bytes(self) -> bytes:
        """What was kept, when the pipe has ended; what a process elsewhere still holds open is not waited for."""
        self._reader.join(_PATIENCE)
        return bytes(self._kept[-_MOST_KEPT:])


def _last(printed: bytes, lines: int) -> str:
    """The last lines with text, as one."""
    found: Sequence[str] = [line.strip() for line in printed.decode(errors="replace").splitlines() if line.strip()]
    return " / ".join(map(shortened, found[-lines:]))
