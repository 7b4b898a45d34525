"""What an ADAPTER argument stands for: a Hub id, a folder, or `-` for ids or JSONL rows on stdin."""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from lora_cli.catalogue import Catalogue
from lora_cli.errors import NothingMatched, UsageError
from lora_cli.records import Adapter

_REVISION = re.compile(r"@([0-9a-f]{4,40})(?=$|:)")


def expand(texts: Sequence[str]) -> list[str]:
    """The arguments with `-` replaced by what stdin lists, each once, in order. UsageError for a line without an id."""
    out: list[str] = []
    for text in texts:
        out += _from_stdin() if text == "-" else [text]
    return list(dict.fromkeys(out))


def known_adapter(catalogue: Catalogue, text: str) -> Adapter:
    """The catalogue's row for an id (with `@commit` only that version of it) or for a folder.

    Raises:
        NothingMatched: unknown, with ids that look like it; or known at another commit.
    """
    if text.startswith((".", "/", "~")) and (folder := Path(text).expanduser()).is_dir():
        found = catalogue.at(folder)
        if found is None:
            raise NothingMatched(f"{text}: not in the catalogue", hint=f"lora pool sync --from {folder.parent}")
        return found
    wanted = _REVISION.search(text)
    row = catalogue.get(_REVISION.sub("", text))
    if wanted and not row.commit.startswith(wanted[1]):
        raise NothingMatched(f"{row.id} is known at {row.commit[:12]}, not at {wanted[1]}", hint="lora pool sync")
    return row


def _from_stdin() -> list[str]:
    lines = [line.strip() for line in sys.stdin]
    return [_id_in(line) for line in lines if line]


def _id_in(line: str) -> str:
    if not line.startswith("{"):
        return line.split("\t")[0]
    try:
        return str(json.loads(line)["id"])
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"stdin: no id in {line[:60]!r}", hint="give ids, or JSON objects with an id") from None
