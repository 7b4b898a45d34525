"""`-` as an ADAPTER argument: ids or JSONL rows on stdin."""

import sys
from collections.abc import Sequence

from lora_cli.errors import NothingMatched, UsageError
from lora_cli.escapes import id_in_line


def expand(texts: Sequence[str]) -> list[str]:
    """The arguments with `-` replaced by the ids on stdin, in order.

    Raises UsageError for a line without an id, NothingMatched for no line at all.
    """
    out: list[str] = []
    for text in texts:
        out += _from_stdin() if text == "-" else [text]
    return out


def _from_stdin() -> list[str]:
    # Some editors begin a file with a byte order mark.
    lines = [line.strip().removeprefix("\ufeff") for line in sys.stdin]
    found = [_id_in(line) for line in lines if line]
    if not found:
        raise NothingMatched("no ids on stdin", hint="the command before the pipe found nothing")
    return found


def _id_in(line: str) -> str:
    try:
        return id_in_line(line)
    except ValueError:
        raise UsageError(f"stdin: no id in {line[:60]!r}", hint="give ids, or JSON objects with an id") from None
