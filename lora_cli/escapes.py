"""Strangers' texts made safe for a terminal, and ids on lines that read back as they were."""

import json
import math
import unicodedata
from collections.abc import Mapping
from typing import Any

from lora_cli.redaction import redacted

# Characters that show nothing although their category is one of those that print: Default_Ignorable_Code_Point of
# Unicode 16 outside the categories C and Z (fillers of Hangul, selectors of variants, joiners), and four blanks.
_INVISIBLE = frozenset(
    [
        0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, *range(0x180B, 0x1810), 0x2800, 0x3164, *range(0xFE00, 0xFE10), 0xFFA0,
        0x13441, 0x16FE4, 0x1D159, *range(0xE0100, 0xE01F0),
    ]
)  # fmt: skip

FORMULAS = ("=", "+", "-", "@", "\t", "\r")
"""The beginnings of a text that a spreadsheet runs as a formula."""


def safe(text: object) -> str:
    """`text`, redacted, with every character that does not show as an escape (\\x1b, \\u202e); spaces stay."""
    shown = redacted(str(text))
    if shown.isascii() and shown.isprintable():
        return shown
    return "".join(char if _shows(char) else _escape(ord(char)) for char in shown)


def csv_cell(value: Any) -> Any:
    """A cell of CSV. A text that a spreadsheet would run as a formula begins with an apostrophe."""
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(value)
    if not isinstance(value, str):
        return value
    return f"'{safe(value)}" if value.startswith(FORMULAS) and not _is_number(value) else safe(value)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def as_line(id: str) -> str:
    """An id as one line for scripts: itself, or a JSON string in ASCII if it would not show or read back as it is."""
    plain = id == safe(id) and id == id.strip() and id and id[0] not in '"{'
    return id if plain else redacted(json.dumps(id))


def id_in_line(line: str) -> str:
    """The id of a line: an id or lines of a table as printed, a JSON string, or a JSON object with an id.

    The id of an object with a commit is `id@commit`. ValueError for a line without an id.
    """
    if not line.startswith(('"', "{")):
        return line.split("\t")[0]
    try:
        found = json.loads(line)
        id = found["id"] if isinstance(found, dict) else found
        if not isinstance(id, str):
            raise TypeError("an id that is no text")
        return f"{id}@{found['commit']}" if isinstance(found, dict) and found.get("commit") else id
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError("no id") from error


def _shows(char: str) -> bool:
    return char == " " or (unicodedata.category(char)[0] not in "CZ" and ord(char) not in _INVISIBLE)


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
