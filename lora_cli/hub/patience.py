"""How long a request may take, whatever the server sends: no silence, drip or endless body holds it for ever."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from lora_cli.errors import Partial
from lora_cli.records import Progress
from lora_cli.text import counted

if TYPE_CHECKING:
    import httpx2

SILENCE_SECONDS = 25.0
REQUEST_SECONDS = 60.0
SLOWEST = 10_000  # bytes per second, sent or received, that lengthen a request beyond REQUEST_SECONDS by as much
WAITING = "waiting for the Hub, seconds"
_FIRST_WORD = 3.0
_STEP = 1.0  # between two looks at the clock, the user's patience and `stop`
_PIECE = 1 << 16  # bytes that are sent between two such looks


class Overdue(Exception):
    """A request took its whole time, though bytes may have come in."""


class Unreachable(Exception):
    """No connection to a server could be made: `silent` if it gave no answer at all."""

    def __init__(self, *, silent: bool) -> None:
        super().__init__()
        self.silent = silent


class Stopped(Exception):
    """The connection was told to stop."""


class BudgetSpent(Partial):
    """The number of requests allowed for this piece of work is used up."""


class Patience:
    """What the requests of one connection share: the user who waits, the order to stop, the last sign of the Hub.

    `last_answer` is the time of the last whole head of an answer. `budget` is the most requests, None for no limit.
    """

    def __init__(self, progress: Progress, budget: int | None = None) -> None:
        self.budget = budget
        self._sent = 0
        self.stopped = threading.Event()
        self.last_answer = 0.0
        self._progress = progress
        self._shown = False
        self._lock = threading.RLock()

    def show_wait(self, elapsed: float, limit: float) -> None:
        """Say that the Hub keeps the user waiting."""
        with self._lock:
            self._shown = True
            self._progress(WAITING, int(elapsed), int(limit) + 1)

    def hide_wait(self) -> None:
        """Take what `show_wait` shows away."""
        if self._shown:
            with self._lock:
                self._shown = False
                self._progress(WAITING, 1, 1)

    def spend(self, requests: int = 1) -> None:
        """Count requests that are about to be sent; with 0 only look. Raises BudgetSpent if they are too many."""
        with self._lock:
            if self.budget is not None and self._sent + max(1, requests) > self.budget:
                raise BudgetSpent(f"the budget of {counted(self.budget, 'request')} is spent", hint="rerun to continue")
            self._sent += requests

    def answered(self) -> None:
        """Note the head of an answer."""
        self.last_answer = time.monotonic()
        self.hide_wait()


class Attempt:
    """One try of a question, in one thread. `largest` is the most bytes of a body, None for no limit of its own.

    `on_sent` is called with the bytes that were sent so far.
    """

    def __init__(self, patience: Patience) -> None:
        self.patience = patience
        self.moved = 0
        self.largest: int | None = None
        self.on_sent: Callable[[int], None] = lambda sent: None
        self._sent = 0
        self._begin = self._last = time.monotonic()

    @property
    def idle(self) -> float:
        """The seconds since its last byte; those since its begin beyond the time of its bytes, if these are more."""
        now = time.monotonic()
        return max(now - self._last, now - self._begin - self.moved / SLOWEST)

    def _move(self, count: int) -> None:
        self.moved += count
        self._last = time.monotonic()

    def left(self) -> float:
        """The seconds it may still take. Raises Overdue, or Stopped."""
        if self.patience.stopped.is_set():
            raise Stopped
        left = self._begin + REQUEST_SECONDS + self.moved / SLOWEST - time.monotonic()
        if left <= 0:
            raise Overdue
        return left

    def read(self, stream: Any, most: int, timeout: float | None) -> bytes:
        """Some bytes of the stream, whose wait is cut into steps. The user is told from the third second on."""
        begin = time.monotonic()
        while True:
            left = self.left()
            if timeout is not None:
                left = min(left, begin + timeout - time.monotonic())
            try:
                data: bytes = stream.read(most, max(0.01, min(_STEP, left)))
            except Exception as error:
                import httpcore2

                elapsed = time.monotonic() - begin
                if not isinstance(error, httpcore2.ReadTimeout) or (timeout is not None and elapsed >= timeout):
                    raise
                if elapsed >= _FIRST_WORD:
                    self.patience.show_wait(elapsed, timeout or REQUEST_SECONDS)
            else:
                self._move(len(data))
                return data

    def write(self, stream: Any, data: bytes, timeout: float | None) -> None:
        """Send all of `data`, a piece at a time, each of which ends within the time that is left."""
        view = memoryview(data)
        for start in range(0, len(view), _PIECE):
            left, piece = self.left(), view[start : start + _PIECE]
            stream.write(piece, left if timeout is None else min(timeout, left))
            self._move(len(piece))
            self._sent += len(piece)
            self.on_sent(self._sent)


_running = threading.local()


def running() -> Attempt | None:
    """The attempt of this thread."""
    found: Attempt | None = getattr(_running, "attempt", None)
    return found


def spend() -> None:
    """Count a request of this thread's attempt. Raises BudgetSpent if it is one too many."""
    if (attempt := running()) is not None:
        attempt.patience.spend()


def answered() -> Attempt | None:
    """The attempt of this thread, for which the head of an answer has come."""
    attempt = running()
    if attempt is not None:
        attempt.patience.answered()
    return attempt


@contextlib.contextmanager
def attempting(patience: Patience) -> Iterator[Attempt]:
    """A block that is one attempt: every transfer over the network in this thread keeps its time."""
    attempt = _running.attempt = Attempt(patience)
    try:
        yield attempt
    finally:
        _running.attempt = None
        patience.hide_wait()


def keep_time(client: "httpx2.Client") -> None:
    """Make every connection of a client keep the time of the attempt that uses it."""
    # Private: a client makes its pools of connections itself, one per proxy, and takes no network of ours.
    for transport in (client._transport, *client._mounts.values()):
        pool = getattr(transport, "_pool", None)
        if pool is not None:
            pool._network_backend = _Network(pool._network_backend)


class _Network:
    """The network of a pool of connections."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def connect_tcp(self, host: str, port: int, timeout: float | None = None, **options: Any) -> "_Stream":
        attempt = running()
        if attempt is None:
            return _Stream(self._inner.connect_tcp(host, port, timeout=timeout, **options))
        import httpcore2

        attempt.patience.show_wait(0, _FIRST_WORD)  # there are no steps in here
        timeout = min(timeout or SILENCE_SECONDS, attempt.left())
        # The limit is for each address of the host in turn, and a host may have a dozen.
        with contextlib.suppress(OSError):
            timeout /= len({found[4] for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)})
        try:
            return _Stream(self._inner.connect_tcp(host, port, timeout=timeout, **options))
        except (httpcore2.ConnectTimeout, httpcore2.ConnectError) as error:
            # No error of the transport: the client would try again on its own, for a minute and without a word.
            raise Unreachable(silent=isinstance(error, httpcore2.ConnectTimeout)) from error


class _Stream:
    """One connection."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.close, self.get_extra_info = inner.close, inner.get_extra_info

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        attempt = running()
        return (
            self._inner.read(max_bytes, timeout) if attempt is None else attempt.read(self._inner, max_bytes, timeout)
        )

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        attempt = running()
        if attempt is None:
            self._inner.write(buffer, timeout)
        else:
            attempt.write(self._inner, buffer, timeout)

    def start_tls(self, *arguments: Any, **options: Any) -> "_Stream":
        return _Stream(self._inner.start_tls(*arguments, **options))
