"""A long JSON list from a stranger, one element at a time: no nesting, length or number in it costs much memory."""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

_MOST_ITEMS = 10_000
_DEEPEST = 24
_LONGEST_VALUE = 1_000_000  # bytes of a list or an object within an item
_LONGEST_ITEM = 4_000_000
_LONGEST_NUMBER = 18
# Repeats of more than one character are not possessive: Python before 3.11.5 gets those wrong. Nothing is matched twice
# all the same, because the first character of each part decides which one it is.
_PLAIN = rb'(?:[^"\[\]{}]++|"[^"\\]*+(?:\\.[^"\\]*+)*")*'  # texts, and whatever else is no bracket
_BRACKET = re.compile(_PLAIN + rb"([\[\]{}]?)", re.DOTALL)
_REST_OF_TEXT = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*("?)', re.DOTALL)
_INNER = rb"(?:[\[{]" + _PLAIN + rb"[\]}]" + _PLAIN + rb")*"
_BRACKET_WITHIN = re.compile(_PLAIN + _INNER + rb"([\[\]{}]?)", re.DOTALL)
_SHALLOW = re.compile(
    rb"[\s,]*+(\{" + _PLAIN + rb"(?:[\[{]" + _PLAIN + _INNER + rb"[\]}]" + _PLAIN + rb")*\})", re.DOTALL
)
"""An object of at most two levels below it, as nearly all are, in one step."""


def items(blocks: Iterable[bytes]) -> Iterator[Any]:
    """The objects in a JSON list; numbers, texts and the like are skipped.

    In an object, a list or an object that is too long or nested too deep is None, and so is a number of too many
    digits. Raises ValueError, whose text goes on after "the answer is", for what is no JSON list or is cut short.
    """
    reader = _Reader()
    for block in blocks:
        yield from reader.feed(block)
    if not reader.ended:
        raise ValueError("not JSON, or cut short")


class _Reader:
    """The state between two blocks: how deep, within a text or not, and the bytes of the current item."""

    def __init__(self) -> None:
        self.ended = False
        self._depth = 0
        self._in_text = False
        self._rest = b""  # a backslash whose character comes with the next block
        self._item = bytearray()
        self._value = 0  # where the current list or object within the item begins
        self._deepest = 0
        self._count = 0

    def feed(self, block: bytes) -> Iterator[Any]:
        """The elements that end in this block."""
        data = self._rest + block
        at = taken = 0  # the bytes before `taken` are in the item, or belong to none
        if self._depth == 0:
            self._demand_a_list(data)
        while at < len(data) and not self.ended:
            if self._in_text:
                text = _REST_OF_TEXT.match(data, at)
                assert text is not None
                at, self._in_text = text.end(), not text[1]
                if self._in_text:
                    break
            if self._depth == 1 and (item := _SHALLOW.match(data, at)) and len(item[1]) <= _LONGEST_VALUE:
                at = item.end()
                yield self._loaded(item[1])
                continue
            # Within a value, one level more or less does not matter.
            mark = (_BRACKET if self._depth < 3 else _BRACKET_WITHIN).match(data, at)
            assert mark is not None
            at = mark.end()
            if mark[1]:
                before = self._depth
                taken = self._step(mark[1], data, taken, at)
                if before == 2 and self._depth == 1:
                    yield self._loaded(bytes(self._item))
                    self._item.clear()
            elif at < len(data):
                at, self._in_text = at + 1, True
        if self._depth >= 2:
            self._take(data, taken, at)
            self._shorten()
        self._rest = data[at:]
        if self.ended:
            self._demand_an_end(self._rest)

    def _step(self, sign: bytes, data: bytes, taken: int, at: int) -> int:
        """Go in or out at the bracket that ends at `at`; up to where bytes are taken now."""
        if sign in b"[{":
            self._depth += 1
            self._deepest = max(self._deepest, self._depth)
            if self._depth == 2 and sign == b"[":
                raise ValueError("a list of lists")
            if self._depth == 2:
                return at - 1
            if self._depth == 3:
                taken = self._take(data, taken, at - 1)
                self._value, self._deepest = len(self._item), 3
        else:
            self._depth -= 1
            if self._depth in (1, 2):
                taken = self._take(data, taken, at)
            if self._depth == 2:
                self._end_value()
            self.ended = self._depth == 0
        return taken

    def _take(self, block: bytes, begin: int, end: int) -> int:
        self._item += memoryview(block)[begin:end]
        return end

    def _end_value(self) -> None:
        if self._deepest > _DEEPEST or len(self._item) - self._value > _LONGEST_VALUE:
            self._item[self._value :] = b"null"

    def _loaded(self, item: bytes) -> Any:
        self._count += 1
        if self._count > _MOST_ITEMS:
            raise ValueError(f"a list of more than {_MOST_ITEMS:,} elements")
        try:
            return json.loads(item, parse_int=_number)
        except ValueError as error:
            raise ValueError("not JSON") from error

    def _shorten(self) -> None:
        """Drop what will not be needed: the rest of a value that is too long already."""
        if self._depth >= 3:
            del self._item[self._value + _LONGEST_VALUE + 1 :]
        if len(self._item) > _LONGEST_ITEM:
            raise ValueError(f"a list with an element of more than {_LONGEST_ITEM:,} bytes")

    def _demand_a_list(self, block: bytes) -> None:
        first = block.lstrip()[:1]
        if not self.ended and first not in (b"", b"["):
            raise ValueError("not a list" if first == b"{" else "not JSON")

    def _demand_an_end(self, rest: bytes) -> None:
        if rest.strip():
            raise ValueError("not JSON")


def _number(digits: str) -> int | None:
    return int(digits) if len(digits) <= _LONGEST_NUMBER else None
