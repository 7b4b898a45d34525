"""huggingface_hub's own session: it keeps its login, proxy and offline rules.

It gets limits of time and size, a count of requests and bytes, and a guard that sends the token to trusted servers
only.
"""

import functools
import hashlib
import importlib.metadata
import logging
import os
import re
import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from lora_cli.hub.patience import SILENCE_SECONDS, Attempt, answered, keep_time, running, spend
from lora_cli.hub.problems import Broken, Busy, Unfit
from lora_cli.redaction import hide

if TYPE_CHECKING:
    import httpx2

RETRIED = frozenset({408, 429, 500, 502, 503, 504})
_LONGEST_REFUSAL = 16_384  # bytes of a refusal that are read, so that its connection can be used again
_UNKNOWN_SIZE = 64_000_000  # the most bytes of a file whose size the Hub does not say


class Traffic(NamedTuple):
    """Requests sent (each hop of a redirect counts) and bytes received (heads and bodies, as they are on the wire)."""

    requests: int
    bytes: int


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


meter = _Meter()
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
def prepare() -> None:
    """Give huggingface_hub a session with limits, a meter and a guard on the token, once per process."""
    import httpx2
    from huggingface_hub import constants, set_client_factory
    from huggingface_hub.utils import disable_progress_bars

    # Private: the hook that refuses requests in offline mode and marks each with an id has no public name.
    from huggingface_hub.utils._http import hf_request_event_hook

    # Silence its warnings: they repeat ours, and quote headers from the server.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if not os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS"):
        disable_progress_bars()
    trust(constants.ENDPOINT)
    # Stop huggingface_hub from sending telemetry (installed packages) before our first request.
    constants.HF_HUB_DISABLE_TELEMETRY = True

    def make() -> httpx2.Client:
        client = _client_class()(
            event_hooks={"request": [hf_request_event_hook, _before], "response": [_after]},
            follow_redirects=True,
            timeout=SILENCE_SECONDS,
            headers={"Accept-Encoding": "identity"},
        )
        keep_time(client)
        return client

    set_client_factory(make)


@functools.cache
def _client_class() -> "type[httpx2.Client]":
    import httpx2

    class Client(httpx2.Client):
        """A client in which a transfer that breaks off while it writes is no error of the transport.

        The library would send such a request again on its own, several times, without a word and without a limit.
        """

        def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
            try:
                return super().send(request, **options)
            except httpx2.TransportError as error:
                if running() is None or request.method in ("GET", "HEAD"):
                    raise
                raise Broken from error

    return Client


def _before(request: "httpx2.Request") -> None:
    limits = request.extensions.setdefault("timeout", {})
    # Set time limits: the client's own requests have none.
    for kind in ("connect", "read", "write", "pool"):
        if limits.get(kind) is None:
            limits[kind] = SILENCE_SECONDS
    if (login := request.headers.get("authorization")) is not None:
        hide(login.partition(" ")[2])
    if _origin(f"{request.url.scheme}://{request.url.netloc.decode()}") not in _trusted:
        request.headers.pop("authorization", None)
    spend()
    meter.add(requests=1)


def _after(response: "httpx2.Response") -> None:
    head = sum(len(name) + len(value) + 4 for name, value in response.headers.raw)
    meter.add(received=head + len(response.reason_phrase) + 17)
    attempt = answered()
    refused = attempt is not None and response.status_code >= 400
    if attempt is not None:
        _expect(attempt, response)
    largest = _LONGEST_REFUSAL if refused else None if attempt is None else attempt.largest
    if refused or response.request.headers.get("accept-encoding") == "identity":
        # What was asked for as it is must not be unpacked: it might be as large as it likes.
        response.headers.pop("content-encoding", None)
    response.stream = _body_class()(response.stream, largest, shown=not refused)
    if attempt is not None and response.status_code in RETRIED:
        # Else the client itself would wait, for as long as the server says.
        raise Busy(response)


@functools.cache
def _body_class() -> Any:
    import httpx2

    class Body(httpx2.SyncByteStream):
        """A body that is counted; of a refusal, one that is not shown to the client, which would hold it whole."""

        def __init__(self, stream: Any, largest: int | None, *, shown: bool) -> None:
            self._stream = stream
            self._largest = largest
            self._shown = shown

        def __iter__(self) -> Iterator[bytes]:
            whole = 0
            for block in self._stream:
                meter.add(received=len(block))
                whole += len(block)
                if self._largest is not None and whole > self._largest:
                    if self._shown:
                        raise Unfit("more bytes come than the Hub has told")
                    return
                if self._shown:
                    yield block

        def close(self) -> None:
            self._stream.close()

    return Body


def _expect(attempt: Attempt, response: "httpx2.Response") -> None:
    """Note the size of the file that the client asks about and then downloads."""
    if response.request.method == "HEAD":
        own = "" if response.is_redirect else response.headers.get("content-length", "")
        told = response.headers.get("x-linked-size", own)
        attempt.largest = int(told) if re.fullmatch(r"[0-9]{1,18}", told) else _UNKNOWN_SIZE


def trust(url: str) -> None:
    """Send the token to the server of this URL; no other server gets it."""
    _trusted.add(_origin(url))


@functools.lru_cache(maxsize=64)
def _origin(url: str) -> tuple[str, str, int]:
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or {"https": 443}.get(parts.scheme, 80)


def login_mark() -> str:
    """A text that differs between logins and without one, and reveals nothing about the token."""
    from huggingface_hub import get_token

    token = get_token()
    return hashlib.sha256(token.encode()).hexdigest()[:8] if token else ""
