"""A connection to the Hub: retries, pauses and a budget of requests."""

import contextlib
import functools
import os
import re
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Never, TypeVar

from lora_cli.errors import NetworkError
from lora_cli.hub.patience import (
    REQUEST_SECONDS,
    SILENCE_SECONDS,
    BudgetSpent,
    Overdue,
    Patience,
    Unreachable,
    attempting,
)
from lora_cli.hub.problems import Busy, Halted, Overloaded, Silent, Unfit, is_silence, raise_translated, unwrapped
from lora_cli.hub.session import Traffic, identity, meter, prepare, trust
from lora_cli.records import Progress, silent

if TYPE_CHECKING:
    import httpx2

T = TypeVar("T")

_TRIES = 5
_TRIES_OF_UNFIT = 3  # what is wrong but came at once is seldom right at the fourth time
# Seconds before the first retry of a failed request; doubled each time.
_FIRST_WAIT = 1.0
_LONGEST_PROBE = 10.0
_LONGEST_WAIT = 330.0  # the Hub's rate windows last 300 s


class Connection:
    """A connection to one Hub.

    Args:
        endpoint: default HF_ENDPOINT, else https://huggingface.co.
        progress: called during every wait longer than a second.
        budget: the most requests that this object may send, None for no limit; BudgetSpent is raised beyond.
        silence: seconds without data before a request times out; None for the usual limit.
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

        prepare()
        self.endpoint = (endpoint or os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        trust(self.endpoint)
        self._patience = Patience(progress, budget)
        self._silence = SILENCE_SECONDS if silence is None else silence
        self._tries = tries
        self._start = meter.reading()
        self._pause_until = 0.0

    @property
    def traffic(self) -> Traffic:
        """Requests and bytes since this object was made."""
        now = meter.reading()
        return Traffic(now.requests - self._start.requests, now.bytes - self._start.bytes)

    @functools.cached_property
    def _usual_headers(self) -> Mapping[str, str]:
        """The user agent and the login. The client would read its file of the login for each request."""
        from huggingface_hub.utils import build_hf_headers

        return build_hf_headers(**identity())

    def stop(self) -> None:
        """End every wait of every thread, within a second or two."""
        self._patience.stopped.set()

    @property
    def stopped(self) -> bool:
        """True after `stop`."""
        return self._patience.stopped.is_set()

    def get(
        self,
        url: str | Callable[[], str],
        what: str,
        read: "Callable[[httpx2.Response], T]",
        headers: Mapping[str, str] | None = None,
        allowed: tuple[int, ...] = (200,),
    ) -> T:
        """`read` of the answer to a GET request.

        Args:
            url: the address; a function gives one for each try.
            what: the name of the thing asked for, for error messages.
            read: takes the answer, whose body is not read yet. It raises Unfit, or any error of a value, for an answer
                that cannot be the Hub's: it is asked again.
            headers: more headers than the usual ones.
            allowed: the statuses that `read` takes.
        """
        from huggingface_hub.utils import hf_raise_for_status

        def ask(client: "httpx2.Client") -> T:
            sent = {**self._usual_headers, "Accept-Encoding": "gzip", **(headers or {})}
            address = url if isinstance(url, str) else url()
            with client.stream("GET", address, headers=sent, timeout=self._silence) as response:
                self._obey(response)
                if response.status_code not in allowed:
                    hf_raise_for_status(response)
                    raise Unfit(f"the Hub answers {response.status_code}")
                return read(response)

        return self.attempts(what, ask)

    def attempts(self, what: str, ask: "Callable[[httpx2.Client], T]") -> T:
        """Call `ask` until it succeeds, fails for a permanent reason, or the attempts or their time are used up."""
        from huggingface_hub import get_session

        begin = time.monotonic()
        tried = wait = 0.0
        for attempt in range(1, self._tries + 1):
            self._hold(wait)
            wait = _FIRST_WAIT * 2 ** (attempt - 1)
            with attempting(self._patience) as current:
                try:
                    return ask(get_session())
                except BudgetSpent:
                    raise
                except Exception as caught:
                    error = unwrapped(caught)
                tried += current.idle
            if attempt >= min(_tries_after(error), self._tries) or tried >= REQUEST_SECONDS or self.stopped:
                self._give_up(error, what, begin)
            if isinstance(error, Busy) and error.response.status_code == 429:
                # The limit applies to the account, so every thread waits.
                pause = self._asked_wait(error.response, what) or wait
                self._pause_until = max(self._pause_until, time.monotonic() + pause)
        raise AssertionError("unreachable")

    def _give_up(self, error: Exception, what: str, begin: float) -> Never:
        """Raise this tool's error: Silent if the Hub was, since the first try."""
        try:
            raise_translated(error, what)
        except Overloaded as told:
            if is_silence(error) and self._patience.last_answer < begin and not self._is_there():
                raise Silent(told.message, hint=told.hint) from error
            raise

    def _is_there(self) -> bool:
        """Whether the Hub answers a small question at all: the silence of one repository is not the Hub's."""
        from huggingface_hub import get_session

        begin = time.monotonic()
        with contextlib.suppress(Exception), attempting(self._patience):
            limit = min(self._silence, _LONGEST_PROBE)
            get_session().get(f"{self.endpoint}/api/models", params={"limit": 1}, timeout=limit)
        return self._patience.last_answer >= begin

    def _hold(self, wait: float) -> None:
        """Wait as long as the Hub asks, reporting progress; then check the budget for another request."""
        begin = time.monotonic()
        while (left := max(self._pause_until, begin + wait) - time.monotonic()) > 0:
            if self._patience.stopped.wait(min(left, 1.0)):
                break
            elapsed = time.monotonic() - begin
            if elapsed >= 1.0:
                self._patience.show_wait(elapsed, elapsed + left)
        if self.stopped:
            raise Halted
        self._patience.spend(0)

    def _asked_wait(self, response: "httpx2.Response", what: str) -> float | None:
        seconds = _spent_window(response)
        if seconds is None and (told := re.fullmatch(r"\s*([0-9]{1,9})\s*", response.headers.get("retry-after", ""))):
            seconds = float(told[1])
        if seconds is None:
            return None
        if seconds + 1.0 > _LONGEST_WAIT:
            raise NetworkError(f"{what}: the Hub limits the rate", hint=f"rerun in {seconds + 1.0:.0f} s")
        return seconds + 1.0

    def _obey(self, response: "httpx2.Response") -> None:
        """If an answer shows that the rate window is used up, pause before the next request, which would be refused."""
        for hop in (*response.history, response):
            if hop.status_code < 400 and (seconds := _spent_window(hop)) is not None:
                wait = min(seconds + 1.0, _LONGEST_WAIT)
                self._pause_until = max(self._pause_until, time.monotonic() + wait)


def _spent_window(response: "httpx2.Response") -> float | None:
    """The seconds until the Hub's rate window ends, if an answer says that it is used up."""
    if "ratelimit" not in response.headers:
        return None
    from huggingface_hub.utils import parse_ratelimit_headers

    try:
        limits = parse_ratelimit_headers(response.headers)
        return float(limits.reset_in_seconds) if limits is not None and limits.remaining == 0 else None
    except (ValueError, OverflowError):  # a number of thousands of digits
        return None


def _tries_after(error: Exception) -> int:
    """The tries that are worth it after this error: 1 for a permanent one."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, HfHubHTTPError):
        return 1
    # Do not retry an unknown host much: it stays unknown.
    if isinstance(error, (Unreachable, httpx2.ConnectError)):
        return 3
    transport = (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError, httpx2.DecodingError)
    if isinstance(error, (*transport, LocalEntryNotFoundError, Busy, Overdue)):
        return _TRIES
    try:
        raise_translated(error, "")
    except Unfit:
        return _TRIES_OF_UNFIT
    except Exception:
        return 1
