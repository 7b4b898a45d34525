"""The model card of a folder: its text, and the licence in its front matter."""

import hashlib
import re
from pathlib import Path
from typing import Final

from lora_cli.files import open_regular
from lora_cli.records import MOST_DATASETS

CARD_FILE: Final = "README.md"
_MOST_BYTES = 65_536


def write_card(folder: Path, text: str) -> str:
    """Write the card of a result, and return its SHA-256, by which one that was edited since is known."""
    data = text.encode()
    (folder / CARD_FILE).write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def read_card(folder: Path) -> str:
    """The beginning of the folder's README.md, "" if it cannot be read."""
    try:
        with open_regular(folder / CARD_FILE) as file:
            return file.read(_MOST_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""


def licence_of(card: str) -> str:
    """The licence in a model card's YAML front matter; several are joined by AND."""
    named = _values(card, "license")
    own = _values(card, "license_name")
    return " AND ".join(own if own and named in ([], ["other"]) else named)


def datasets_of(card: str) -> tuple[str, ...]:
    """The data sets in a model card's YAML front matter."""
    return tuple(_values(card, "datasets")[:MOST_DATASETS])


def _values(card: str, key: str) -> list[str]:
    """The plain texts of a key of the front matter: one, a list in brackets, or one with dashes."""
    if not card.startswith("---"):
        return []
    front = card[3:].partition("\n---")[0]
    found = re.search(rf"^{key}:[ \t]*(.*(?:\n[ \t]*-[ \t].*)*)", front, re.MULTILINE)
    lines = found[1].splitlines() if found else []
    texts = [part for line in lines for part in re.sub(r"^[ \t]*-[ \t]|[ \t]#.*$", "", line).strip("[] \t").split(",")]
    return list(filter(None, (text.strip().strip("'\"").strip() for text in texts)))
