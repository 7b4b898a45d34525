"""What can go wrong between a Hub and its client: one fault for chosen requests, or faults at random by a seed."""

import random
import re
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any


@dataclass
class Fault:
    """Something that goes wrong `times` times for requests whose path holds `match`.

    `status`, `headers` and `body` are those of kind "status"; `seconds` is the length of a silence, and the pause
    between two parts of a drip or of a slow body.
    """

    match: str
    kind: str
    times: int
    status: int = 503
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    seconds: float = 30.0


def _status(handler: Any, fault: Fault) -> None:
    handler.answer(fault.status, fault.body, fault.headers)


def _silent(handler: Any, fault: Fault) -> None:
    """Nothing, then the end of the connection."""
    handler.hub.closed.wait(fault.seconds)
    handler.close_connection = True


def _html(handler: Any, _: Fault) -> None:
    """The page of a captive portal."""
    handler.answer(200, b"<html>please log in</html>", {"Content-Type": "text/html"})


def _html_of_unknown_length(handler: Any, _: Fault) -> None:
    page = b"<html>" + b"please log in " * 1000 + b"</html>"
    head = b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n"
    handler.wfile.write(head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(page), page))


def _no_content(handler: Any, _: Fault) -> None:
    handler.answer(204, b"")


def _not_modified(handler: Any, _: Fault) -> None:
    handler.answer(304, b"")


def _odd_port(handler: Any, _: Fault) -> None:
    """A redirect to a port that does not exist."""
    handler.answer(302, b"", {"Location": "http://127.0.0.1:99999/file"})


def _round_in_circles(handler: Any, _: Fault) -> None:
    """A redirect to the same address."""
    handler.answer(302, b"", {"Location": handler.path})


def _absurd_wait(handler: Any, _: Fault) -> None:
    handler.answer(429, b"", {"Retry-After": "9" * 5000, "RateLimit": f'"api";r=0;t={"9" * 5000}'})


def _long_wait(handler: Any, _: Fault) -> None:
    handler.answer(429, b"", {"Retry-After": "100000"})


def _deep_json(handler: Any, _: Fault) -> None:
    handler.answer(200, b"[" * 100_000 + b"]" * 100_000)


def _deep_refusal(handler: Any, _: Fault) -> None:
    handler.answer(400, b'{"error": ' + b"[" * 100_000 + b"]" * 100_000 + b"}")


def _packed(handler: Any, _: Fault) -> None:
    """190 MB of a listing from 185 kB of gzip."""
    handler.answer(200, packed(b"[", b" " * 64, b"]"), {"Content-Encoding": "gzip"})


def _packed_items(handler: Any, _: Fault) -> None:
    handler.answer(200, packed(b"[{}", b",{}" * 21, b"]"), {"Content-Encoding": "gzip"})


def _packed_refusal(handler: Any, _: Fault) -> None:
    handler.answer(400, packed(b"[", b" " * 64, b"]"), {"Content-Encoding": "gzip"})


def _packed_oddly(handler: Any, _: Fault) -> None:
    handler.answer(200, b"\x0b\x02\x80[]\x03", {"Content-Encoding": "br"})


def _dripping_head(handler: Any, fault: Fault) -> None:
    handler.wfile.write(b"HTTP/1.1 200 X\r\nX-Drip: ")
    _drip(handler, fault)


def _dripping_body(handler: Any, fault: Fault) -> None:
    if handler.command == "HEAD":
        return _dripping_head(handler, fault)
    handler.wfile.write(b"HTTP/1.1 200 X\r\nContent-Length: 1000000000\r\n\r\n[")
    return _drip(handler, fault)


def _drip(handler: Any, fault: Fault) -> None:
    handler.close_connection = True
    with suppress(OSError):
        while not handler.hub.closed.wait(min(fault.seconds, 0.05)):
            handler.wfile.write(b" ")
            handler.wfile.flush()


@cache
def packed(begin: bytes, filling: bytes, end: bytes) -> bytes:
    """`begin`, 190 MB of `filling` and `end`, by gzip."""
    pack = zlib.compressobj(1, wbits=31)
    block = filling * (1_000_000 // len(filling))
    parts = [pack.compress(begin), *(pack.compress(block) for _ in range(190)), pack.compress(end), pack.flush()]
    return b"".join(parts)


ANSWERS: Mapping[str, Callable[[Any, Fault], None]] = {
    "status": _status,
    "silent": _silent,
    "html": _html,
    "html-of-unknown-length": _html_of_unknown_length,
    "no-content": _no_content,
    "not-modified": _not_modified,
    "odd-port": _odd_port,
    "round-in-circles": _round_in_circles,
    "absurd-wait": _absurd_wait,
    "long-wait": _long_wait,
    "deep-json": _deep_json,
    "deep-refusal": _deep_refusal,
    "packed": _packed,
    "packed-items": _packed_items,
    "packed-refusal": _packed_refusal,
    "packed-oddly": _packed_oddly,
    "dripping-head": _dripping_head,
    "dripping-body": _dripping_body,
}
"""Faults that replace the whole answer."""

SPOILT = (
    "reset",
    "slow",
    "truncate",
    "cut",
    "corrupt",
    "garbage",
    "no-range",
    "unasked-range",
    "wrong-range",
    "wrong-size",
    "absurd-size",
)
"""Faults in the right answer."""

KINDS = (*ANSWERS, *SPOILT)
LONG = ("silent", "slow", "dripping-head", "dripping-body", "packed", "packed-items", "packed-refusal")
"""The kinds that keep a client or the stand-in busy for a while."""

_STATUSES = (400, 401, 403, 404, 408, 409, 410, 418, 429, 451, 500, 502, 503, 504, 599)
_REPO = re.compile(r"/([\w.-]+/[\w.-]+)/(?:resolve/|[0-9a-f]{40}/)")


class RandomFaults:
    """Faults by a seed: the same for the n-th request of a path whatever the order of the requests.

    Args:
        seed: another seed, other faults.
        share: of the requests, those that go wrong in passing.
        doomed: of the repositories, those whose files cannot be had: all their requests go wrong.
        seconds: the length of a silence.
    """

    def __init__(self, seed: int, *, share: float, doomed: float, seconds: float = 30.0) -> None:
        self._seed = seed
        self._share = share
        self._doomed = doomed
        self._seconds = seconds
        self._asked: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()

    def is_doomed(self, repo: str) -> bool:
        """Whether all requests for files of this repository go wrong."""
        return random.Random(f"{self._seed} {repo}").random() < self._doomed

    def next(self, path: str) -> Fault | None:
        """The fault of this request, whose path begins with the server's name."""
        self._asked[path] += 1
        chance = random.Random(f"{self._seed} {path} {self._asked[path]}")
        repo = _REPO.search(path)
        if repo and self.is_doomed(repo[1]):
            chance = random.Random(f"{self._seed} kind {repo[1]}")
        elif chance.random() >= self._share:
            return None
        kind = chance.choice(KINDS)
        self.sent[kind] += 1
        return Fault("", kind, 1, status=chance.choice(_STATUSES), seconds=self._seconds)


ODD_NAMES = ("x/two--dashes", "x/ends.git", f"x/{'long' * 30}", "x/dot..dot", "x/-dash-")
"""Names of repositories that the Hub's client refuses."""

ODD_ITEMS: Mapping[str, Mapping[str, str]] = {
    "x/deep-card": {"cardData": "[" * 50_000 + "]" * 50_000},
    "x/deep-config": {"config": '{"peft": ' * 50_000 + "{}" + "}" * 50_000},
    "x/long-card": {"cardData": '{"tags": ["' + "long" * 300_000 + '"]}'},
    "x/many-files": {"siblings": "[" + '{"rfilename": "a/b"},' * 50_000 + '{"rfilename": "adapter_config.json"}]'},
    "x/absurd-numbers": {"downloads": "9" * 5000, "likes": "-1e999"},
}
"""Repositories whose entry in the listing is odd, by the JSON in place of its properties."""
