"""A connection to the Hub: retries, pauses and a budget of requests, on huggingface_hub's own session.

The session keeps its login, proxy and offline rules; it gets time limits, a count of requests and bytes, and a guard
that sends the token to trusted servers only.
"""

import functools
import hashlib
import importlib.metadata
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from lora_cli.errors import NetworkError
from lora_cli.hub.problems import BudgetSpent, raise_translated
from lora_cli.records import Progress, silent
from lora_cli.redaction import hide

if TYPE_CHECKING:
    import httpx2

T = TypeVar("T")

_RETRIED = frozenset({408, 429, 500, 502, 503, 504})
_TRIES = 5
# Seconds before the first retry of a failed request; doubled each time.
_FIRST_WAIT = 1.0
_LONGEST_WAIT = 330.0  # the Hub's rate windows last 300 s
_SILENCE_SECONDS = 30.0


class Traffic(NamedTuple):
    """Requests sent (each hop of a redirect counts) and bytes received (heads and bodies, as they are on the wire)."""

    requests: int
    bytes: int


class Connection:
    """A connection to one Hub.

    Args:
        endpoint: default HF_ENDPOINT, else https://huggingface.co.
        progress: called during every wait longer than a second.
        budget: the most requests that this object may send, None for no limit; BudgetSpent is raised beyond.
        silence: seconds without data before a request times out; None for the usual half a minute.
        tries: the most attempts per request.
    """

    def __init__(
        self,
        endpoint: str = "",
        *,
        progress: Progress = silent,
        budget: int | None = None,
        silence: float | None = None,
        tries: int = _TRIES,
    ) -> None:
        from huggingface_hub import constants

        _prepare()
        self.endpoint = (endpoint or os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        _trust(self.endpoint)
        self._progress = progress
        self._budget = budget
        self._silence = _SILENCE_SECONDS if silence is None else silence
        self._tries = tries
        self._start = _meter.reading()
        self._stopped = threading.Event()
        self._pause_until = 0.0

    @property
    def traffic(self) -> Traffic:
        """Requests and bytes since this object was made."""
        now = _meter.reading()
        return Traffic(now.requests - self._start.requests, now.bytes - self._start.bytes)

    def stop(self) -> None:
        """End every wait of every thread: the current request becomes the last one."""
        self._stopped.set()

    @property
    def stopped(self) -> bool:
        """True after `stop`."""
        return self._stopped.is_set()

    def get(
        self,
        url: str,
        what: str,
        read: "Callable[[httpx2.Response], T]",
        headers: Mapping[str, str] | None = None,
        allowed: tuple[int, ...] = (),
    ) -> T:
        """`read` of the answer to a GET request.

        Args:
            url: the address.
            what: the name of the thing asked for, for error messages.
            read: takes the answer, whose body is not read yet.
            headers: more headers than the usual ones.
            allowed: error statuses that `read` handles.
        """
        from huggingface_hub.errors import HfHubHTTPError
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        def ask(client: "httpx2.Client") -> T:
            sent = {**build_hf_headers(**identity()), **(headers or {})}
            with client.stream("GET", url, headers=sent, timeout=self._silence) as response:
                self._obey(response)
                if response.status_code not in allowed:
                    try:
                        hf_raise_for_status(response)
                    except (AttributeError, TypeError) as error:  # an error page whose JSON is not an object
                        raise HfHubHTTPError(f"status {response.status_code}", response=response) from error
                return read(response)

        return self.attempts(what, ask)

    def attempts(self, what: str, ask: "Callable[[httpx2.Client], T]") -> T:
        """Call `ask` until it succeeds, fails for a permanent reason, or the attempts are used up."""
        import httpx2
        from huggingface_hub import get_session
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        transport = (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError)
        wait = 0.0
        for attempt in range(1, _TRIES + 1):
            self._hold(wait)
            wait = _FIRST_WAIT * 2 ** (attempt - 1)
            try:
                return ask(get_session())
            except (*transport, LocalEntryNotFoundError, HfHubHTTPError) as error:
                response = error.response if isinstance(error, HfHubHTTPError) else None
                if response is not None and response.status_code not in _RETRIED:
                    raise_translated(error, what)
                # Do not retry an unknown host: it stays unknown.
                tries = 3 if isinstance(error, httpx2.ConnectError) else _TRIES
                if attempt >= min(tries, self._tries) or self.stopped:
                    raise_translated(error, what)
                if response is not None and response.status_code == 429:
                    # The limit applies to the account, so every thread waits.
                    pause = self._asked_wait(response, what) or wait
                    self._pause_until = max(self._pause_until, time.monotonic() + pause)
            except Exception as error:
                raise_translated(error, what)
        raise AssertionError("unreachable")

    def _hold(self, wait: float) -> None:
        """Wait as long as the Hub asks, reporting progress; then check the budget for another request."""
        begin = time.monotonic()
        while (left := max(self._pause_until, begin + wait) - time.monotonic()) > 0:
            if self._stopped.wait(min(left, 1.0)):
                break
            elapsed = time.monotonic() - begin
            if elapsed >= 1.0:
                self._progress("waiting for the Hub, seconds", int(elapsed), int(elapsed + left) + 1)
        if self.stopped:
            raise NetworkError("stopped", hint="rerun to continue")
        if self._budget is not None and self.traffic.requests >= self._budget:
            raise BudgetSpent(f"the budget of {self._budget} requests is spent", hint="rerun to continue")

    def _asked_wait(self, response: "httpx2.Response", what: str) -> float | None:
        from huggingface_hub.utils import parse_ratelimit_headers

        limits = parse_ratelimit_headers(response.headers)
        seconds: float | None = None
        if limits is not None and limits.remaining == 0:
            seconds = limits.reset_in_seconds + 1.0
        elif response.headers.get("retry-after", "").strip().isdigit():
            seconds = float(response.headers["retry-after"]) + 1.0
        if seconds is not None and seconds > _LONGEST_WAIT:
            raise NetworkError(f"{what}: the Hub limits the rate", hint=f"rerun in {seconds:.0f} s")
        return seconds

    def _obey(self, response: "httpx2.Response") -> None:
        """If an answer shows that the rate window is used up, pause before the next request, which would be refused."""
        from huggingface_hub.utils import parse_ratelimit_headers

        for hop in (*response.history, response):
            limits = parse_ratelimit_headers(hop.headers)
            if hop.status_code < 400 and limits is not None and limits.remaining == 0:
                wait = min(limits.reset_in_seconds + 1.0, _LONGEST_WAIT)
                self._pause_until = max(self._pause_until, time.monotonic() + wait)


class _Meter:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests = 0
        self._bytes = 0

    def add(self, *, requests: int = 0, received: int = 0) -> None:
        with self._lock:
            self._requests += requests
            self._bytes += received

    def reading(self) -> Traffic:
        with self._lock:
            return Traffic(self._requests, self._bytes)


_meter = _Meter()
_trusted: set[tuple[str, str, int]] = set()


@functools.cache
def identity() -> Mapping[str, Any]:
    """The user agent of this tool."""
    try:
        version = importlib.metadata.version("lora-cli")
    except importlib.metadata.PackageNotFoundError:
        version = "0"
    return {"library_name": "lora", "library_version": version}


@functools.cache
def _prepare() -> None:
    """Give huggingface_hub a session with time limits, a meter and a guard on the token, once per process."""
    import httpx2
    from huggingface_hub import constants, set_client_factory
    from huggingface_hub.utils import disable_progress_bars

    # Private: the hook that refuses requests in offline mode and marks each with an id has no public name.
    from huggingface_hub.utils._http import hf_request_event_hook

    # Silence its warnings: they repeat ours, and quote headers from the server.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if not os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS"):
        disable_progress_bars()
    _trust(constants.ENDPOINT)
    # Stop huggingface_hub from sending telemetry (installed packages) before our first request.
    constants.HF_HUB_DISABLE_TELEMETRY = True

    class Counted(httpx2.SyncByteStream):
        def __init__(self, stream: httpx2.SyncByteStream) -> None:
            self._stream = stream

        def __iter__(self) -> Iterator[bytes]:
            for block in self._stream:
                _meter.add(received=len(block))
                yield block

        def close(self) -> None:
            self._stream.close()

    def before(request: httpx2.Request) -> None:
        limits = request.extensions.setdefault("timeout", {})
        # Set time limits: a silent server must not block for ever, and the client's own requests have none.
        for kind in ("connect", "read", "write", "pool"):
            if limits.get(kind) is None:
                limits[kind] = _SILENCE_SECONDS
        hide(request.headers.get("authorization", "").partition(" ")[2])
        if _origin(str(request.url)) not in _trusted:
            request.headers.pop("authorization", None)
        _meter.add(requests=1)

    def after(response: httpx2.Response) -> None:
        head = sum(len(name) + len(value) + 4 for name, value in response.headers.raw)
        _meter.add(received=head + len(response.reason_phrase) + 17)
        if isinstance(response.stream, httpx2.SyncByteStream):
            response.stream = Counted(response.stream)

    def make() -> httpx2.Client:
        return httpx2.Client(
            event_hooks={"request": [hf_request_event_hook, before], "response": [after]},
            follow_redirects=True,
            timeout=_SILENCE_SECONDS,
        )

    set_client_factory(make)


def _trust(url: str) -> None:
    """Send the token to the server of this URL; no other server gets it."""
    _trusted.add(_origin(url))


def _origin(url: str) -> tuple[str, str, int]:
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or {"https": 443}.get(parts.scheme, 80)


def login_mark() -> str:
    """A text that differs between logins and without one, and reveals nothing about the token."""
    from huggingface_hub import get_token

    token = get_token()
    return hashlib.sha256(token.encode()).hexdigest()[:8] if token else ""
