"""`-` as an ADAPTER argument: ids or JSONL rows on stdin."""

import sys
from collections.abc import Sequence

from lora_cli.errors import UsageError
from lora_cli.escapes import id_in_line


def expand(texts: Sequence[str]) -> list[str]:
    """The arguments with `-` replaced by the ids on stdin, in order. UsageError for a line without an id."""
    out: list[str] = []
    for text in texts:
        out += _from_stdin() if text == "-" else [text]
    return out


def _from_stdin() -> list[str]:
    # Some editors begin a file with a byte order mark.
    lines = [line.strip().removeprefix("\ufeff") for line in sys.stdin]
    return [_id_in(line) for line in lines if line]


def _id_in(line: str) -> str:
    try:
        return id_in_line(line)
    except ValueError:
        raise UsageError(f"stdin: no id in {line[:60]!r}", hint="give ids, or JSON objects with an id") from None
