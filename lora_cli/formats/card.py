"""The model card of a folder: its text, and the licence in its front matter."""

import re
from pathlib import Path

from lora_cli.files import open_regular

_MOST_BYTES = 65_536
_LICENCE = re.compile(r"^license(?:_name)?:[ \t]*['\"]?([^\s'\"#]+)", re.MULTILINE)


def read_card(folder: Path) -> str:
    """The beginning of the folder's README.md, "" if it cannot be read."""
    try:
        with open_regular(folder / "README.md") as file:
            return file.read(_MOST_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""


def licence_of(card: str) -> str:
    """The licence in a model card's YAML front matter."""
    if not card.startswith("---"):
        return ""
    front = card[3:].partition("\n---")[0]
    named = _LICENCE.findall(front)
    return next((name for name in named if name != "other"), named[0] if named else "")
