"""A report's page: no text of a stranger is markup or script, and nothing is asked for."""

import base64
import hashlib
import re

from hypothesis import given
from hypothesis import strategies as st

from lora_cli.escapes import safe
from lora_cli.redaction import hide
from lora_cli.reports.page import element, page, shown
from tests.reports.reading import Read

HOSTILE = (
    "</script><script>hit()</script>",
    "</style></table></body></html>",
    "<img src=x onerror=hit()>",
    "<!--<script>",
    "]]><![CDATA[<?xml?>",
    "\" onfocus='hit()' autofocus x=\"`",
    "&lt;b&gt; &#60;b&#62; &amp",
    "$policy ${script} {{7*7}} ${7*7}",
    "esc\x1b[31m\x07\x00\x9f\r\n\t",
    "bidi\u202egnp\u2066\u200b\ufeff",
    "line\u2028and\u2029paragraph",
    "half \ud800 a pair",
    "中文 🙂 é",
    "javascript:hit()",
    "https://example.org/x.png",
    "=1+1",
)


def shape(read: Read) -> list[tuple[str, list[str]]]:
    return [(tag, sorted(given)) for tag, given in read.elements]


def framed(text: str) -> Read:
    """A page that holds a text wherever one may stand."""
    return Read(page(text, element("p", text, title=text), {"text": [safe(text)]}))


def demand_harmless(text: str) -> None:
    read = framed(text)
    assert shape(read) == shape(framed("plain"))
    assert read.others == []
    assert [one for one in read.texts if one.strip()] == ([safe(text)] * 2 if safe(text).strip() else [])
    assert [given["title"] for tag, given in read.elements if tag == "p"] == [safe(text)]
    assert read.data == {"text": [safe(text)]}
    assert len(read.raw["script"]) == 2
    assert not set(read.raw["script"][0]) & set("<>&\u2028\u2029")


def test_a_hostile_text_is_text_wherever_it_stands() -> None:
    for text in HOSTILE:
        demand_harmless(text)


@given(st.text() | st.text(alphabet="<>&\"'/!-scriptSCRIPT =\\u\u2028$"))
def test_any_text_is_text(text: str) -> None:
    demand_harmless(text)


def test_the_policy_allows_the_two_inline_parts_by_their_hashes_and_nothing_else() -> None:
    read = framed("x")
    [style], [_, script] = read.raw["style"], read.raw["script"]

    def source(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    assert read.policy.split("; ") == [
        "default-src 'none'",
        f"script-src {source(script)}",
        f"style-src {source(style)}",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    kinds = [given.get("type", "") for tag, given in read.elements if tag == "script"]
    assert kinds == ["application/json", ""]


def test_a_page_asks_for_nothing_and_styles_and_scripts_nothing_inline() -> None:
    read = framed("x")
    given = [(name, value) for _, given in read.elements for name, value in given.items()]
    places = ("src", "href", "srcset", "action", "data", "poster", "background", "ping", "manifest")
    assert [(name, value) for name, value in given if name in places] == [("href", "data:,")]
    assert [name for name, _ in given if name == "style" or name.startswith("on")] == []
    assert re.findall(r"url\(|@import|@font-face|https?:", read.raw["style"][0]) == []
    asking = r"https?:|fetch\(|XMLHttpRequest|WebSocket|sendBeacon|import\("
    making = r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\("
    assert re.findall(f"{asking}|{making}", read.raw["script"][1]) == []


def test_a_page_is_plain_ascii_and_the_same_each_time() -> None:
    first, again = (page("é中", element("p", "é中🙂"), {"a": ["é"]}) for _ in range(2))
    assert first == again
    assert first.isascii()
    assert Read(first).texts.count("é中🙂") == 1


def test_the_login_is_in_no_page() -> None:
    token = "S3cret/not+of=the usual:form"
    hide(token)
    for text in (token, f"hf_{'cAnArY7' * 5}", f"Authorization: Bearer {token}"):
        made = page(text, element("p", text, title=text), [shown(text)])
        assert b"cAnArY7" not in made
        assert token.encode() not in made
        assert b"[redacted]" in made


def test_a_long_text_is_cut() -> None:
    assert shown("x" * 300) == "x" * 300
    assert "hf_" not in shown("x " * 140 + "hf_" + "a1" * 20)
    assert shown("x" * 65_000) == "x" * 300 + "…"
