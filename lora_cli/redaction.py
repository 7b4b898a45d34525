"""Secrets kept out of every text that leaves the process: the login's token in any form, headers that carry one."""

import json
import re
from collections.abc import Iterable
from typing import Any, TextIO
from urllib.parse import quote

_HIDDEN = "[redacted]"
_SHORTEST = 8
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
_HEADER = re.compile(
    r"(authorization['\"]?\s*[:=,]\s*(?:b?['\"])?(?:(?:bearer|basic|token)\s+)?)[\w.~+/=-]{4,}", re.IGNORECASE
)
_BEARER = re.compile(r"(\bbearer\s+)(?=\S*\d)[\w.~+/=-]{16,}", re.IGNORECASE)
_secrets: set[str] = set()


def hide(secret: str) -> None:
    """Keep `secret` out of all later texts, unless it is shorter than 8 characters."""
    if len(secret) >= _SHORTEST:
        _secrets.update((secret, quote(secret, safe=""), json.dumps(secret)[1:-1]))


def redacted(text: str) -> str:
    """`text` without tokens of the Hub, credentials of headers, and secrets that were given to `hide`."""
    for secret in _secrets:
        text = text.replace(secret, _HIDDEN)
    # Most texts hold none of these words, and looking for a word is quicker than an expression.
    lowered = text.lower()
    if "hf_" in lowered:
        text = _TOKEN.sub(_HIDDEN, text)
    if "authorization" in lowered:
        text = _HEADER.sub(rf"\1{_HIDDEN}", text)
    return _BEARER.sub(rf"\1{_HIDDEN}", text) if "bearer" in lowered else text


def holds_a_token(text: str) -> bool:
    """Whether `text` holds a token of the Hub, or a secret that was given to `hide`."""
    return _TOKEN.search(text) is not None or any(secret in text for secret in _secrets)


class Redacting:
    """A text stream that passes redacted text on to another one."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write `text`, redacted."""
        self._stream.write(redacted(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write every text of `lines`, redacted."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
