"""A page as a browser's parser sees it: its elements, its texts, its scripts and styles."""

import json
from html.parser import HTMLParser
from typing import Any

WITHOUT_END = ("meta", "link", "input", "br")


class Read(HTMLParser):
    """A page that was parsed. `texts` are those outside scripts and styles, `raw` those inside, by element."""

    def __init__(self, page: bytes) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self.others: list[str] = []
        self.tables: list[list[list[str]]] = []
        self._open: list[str] = []
        self.feed(page.decode("utf-8"))
        self.close()
        assert self._open == []

    @property
    def policy(self) -> str:
        [found] = [
            given["content"] for tag, given in self.elements if given.get("http-equiv") == "Content-Security-Policy"
        ]
        return found or ""

    @property
    def data(self) -> Any:
        return json.loads(self.raw["script"][0])

    @property
    def rows(self) -> list[list[str]]:
        """The rows of the table of adapters."""
        return self.tables[-1][1:]

    def count(self, title: str) -> dict[str, tuple[str, str]]:
        """The numbers of all and of usable adapters below a heading, by label."""
        [[head, *rows]] = [table for table in self.tables if table[0][0] == title]
        assert head[1:] == ["", "all", "usable"]
        return {label: (every, usable) for label, _, every, usable in rows}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs)
        self.elements.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in WITHOUT_END:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in self.raw:
            self.raw[self._open[-1]].append(data)
            return
        self.texts.append(data)
        if "td" in self._open or "th" in self._open:
            self.tables[-1][-1][-1] += data

    def handle_comment(self, data: str) -> None:
        self.others.append(data)

    def handle_pi(self, data: str) -> None:
        self.others.append(data)

    def unknown_decl(self, data: str) -> None:
        self.others.append(data)
