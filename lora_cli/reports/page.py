"""The frame of a report: markup in which no text of a stranger is markup, and a page that asks for nothing.

The page's policy allows one script and one style sheet, by their hashes, and no request to anywhere.
"""

import base64
import hashlib
import html
import json
from pathlib import Path
from string import Template

from lora_cli.escapes import safe

BEGINNING = b"<!doctype html>"
"""The first bytes of every page."""
_FOLDER = Path(__file__).parent
_POLICY = (
    "default-src 'none'; script-src '{script}'; style-src '{style}'; img-src data:; base-uri 'none'; form-action 'none'"
)
_LONGEST = 300
# In JSON these characters stand in texts alone; unescaped they could end the element that holds it.
_IN_SCRIPT = {ord(char): f"\\u{ord(char):04x}" for char in "<>&"}


class Html(str):
    """Text that is markup. Any other text becomes markup by `element` alone, which escapes it."""

    __slots__ = ()


def element(name: str, /, *inside: object, **attributes: object) -> Html:
    """An element around `inside`: what is not `Html` is escaped. `class_` is the attribute class, `a_b` is a-b."""
    given = "".join(f' {key.rstrip("_").replace("_", "-")}="{_escaped(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{given}>{joined(*inside)}</{name}>")


def joined(*pieces: object) -> Html:
    """Pieces beside each other: what is not `Html` is escaped."""
    return Html("".join(piece if isinstance(piece, Html) else _escaped(piece) for piece in pieces))


def shown(text: str) -> str:
    """A stranger's text for a page, cut after 300 characters. It is not escaped for HTML yet."""
    whole = safe(text)
    return whole if len(whole) <= _LONGEST else f"{whole[:_LONGEST]}…"


def page(title: str, body: Html, data: object = None) -> bytes:
    """A whole page: its body, and the data that the script of its table reads; without them it has no script.

    Texts in `data` have passed `safe` before.
    """
    script, style = _own("page.js"), _own("page.css")
    return (
        Template(_own("page.html"))
        .substitute(
            policy=_POLICY.format(script="none" if data is None else _hash(script), style=_hash(style)),
            title=_escaped(title),
            style=style,
            body=body,
            scripts="" if data is None else _scripts(script, data),
        )
        .encode("ascii", "xmlcharrefreplace")
    )


def _scripts(script: str, data: object) -> str:
    told = json.dumps(data, separators=(",", ":"), allow_nan=False).translate(_IN_SCRIPT)
    return f'<script type="application/json" id="data">{told}</script>\n<script>{script}</script>\n'


def _escaped(value: object) -> str:
    return html.escape(safe(value))


def _own(name: str) -> str:
    return (_FOLDER / name).read_text("ascii")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
