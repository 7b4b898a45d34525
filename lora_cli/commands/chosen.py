"""The ids behind an ADAPTER argument: those on stdin for `-`, and what was written last where there is none."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_cli.errors import NothingMatched, UsageError
from lora_cli.escapes import id_in_line
from lora_cli.screen import near
from lora_cli.settings import Settings

if TYPE_CHECKING:
    from lora_cli.steps.opened_pool import Pool


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


def chosen_or_last(pool: "Pool", adapters: Sequence[str] | None, settings: Settings) -> tuple[str, ...]:
    """The adapters to evaluate: those that are named, else the ones that merge, fit and train wrote last."""
    if adapters:
        return pool.unweighted(expand(adapters), verb="eval")

    from lora_cli.steps.evaluate.request import last_written

    names = tuple(last_written(settings.db))
    pool.announce(f"adapters: {', '.join(near(Path(name)) for name in names)}, written last")
    return names
