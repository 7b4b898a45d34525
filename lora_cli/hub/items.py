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
_MARK = re.compile(rb'\\.?|["\[\]{}]', re.DOTALL)


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
    """The state between two blocks: how deep, within a string or not, and the bytes of the current item."""

    def __init__(self) -> None:
        self.ended = False
        self._depth = 0
        self._quoted = False
        self._escaped = False
        self._item = bytearray()
        self._value = 0  # where the current list or object within the item begins
        self._deepest = 0
        self._count = 0

    def feed(self, block: bytes) -> Iterator[Any]:
        """The elements that end in this block."""
        taken = 0  # the bytes of this block before it are in the item, or belong to none
        start, self._escaped = int(self._escaped), False
        if self._depth == 0:
            self._demand_a_list(block)
        for mark in _MARK.finditer(block, start):
            sign = mark[0]
            if sign[:1] == b"\\":
                self._escaped = len(sign) == 1
            elif sign == b'"':
                self._quoted = not self._quoted
            elif self._quoted:
                continue
            elif sign in b"[{":
                self._depth += 1
                self._deepest = max(self._deepest, self._depth)
                if self._depth == 2:
                    if sign == b"[":
                        raise ValueError("a list of lists")
                    taken = mark.start()
                elif self._depth == 3:
                    taken = self._take(block, taken, mark.start())
                    self._value, self._deepest = len(self._item), 3
            else:
                self._depth -= 1
                if self._depth == 2:
                    taken = self._take(block, taken, mark.end())
                    self._end_value()
                elif self._depth == 1:
                    self._take(block, taken, mark.end())
                    yield self._end_item()
                elif self._depth == 0:
                    self.ended = True
                    return self._demand_an_end(block[mark.end() :])
        if self._depth >= 2:
            self._take(block, taken, len(block))
            self._shorten()
        return None

    def _take(self, block: bytes, begin: int, end: int) -> int:
        self._item += memoryview(block)[begin:end]
        return end

    def _end_value(self) -> None:
        if self._deepest > _DEEPEST or len(self._item) - self._value > _LONGEST_VALUE:
            self._item[self._value :] = b"null"

    def _end_item(self) -> Any:
        self._count += 1
        if self._count > _MOST_ITEMS:
            raise ValueError(f"a list of more than {_MOST_ITEMS:,} elements")
        try:
            return json.loads(self._item, parse_int=_number)
        except ValueError as error:
            raise ValueError("not JSON") from error
        finally:
            self._item.clear()

    def _shorten(self) -> None:
        """Drop what will not be needed: the rest of a value that is too long already."""
        if self._depth >= 3:
            del self._item[self._value + _LONGEST_VALUE + 1 :]
        if len(self._item) > _LONGEST_ITEM:
            raise ValueError(f"a list with an element of more than {_LONGEST_ITEM:,} bytes")

    def _demand_a_list(self, block: bytes) -> None:
        first = block.lstrip()[:1]
        if self.ended:
            self._demand_an_end(block)
        elif first not in (b"", b"["):
            raise ValueError("not a list" if first == b"{" else "not JSON")

    def _demand_an_end(self, rest: bytes) -> None:
        if rest.strip():
            raise ValueError("not JSON")


def _number(digits: str) -> int | None:
    return int(digits) if len(digits) <= _LONGEST_NUMBER else None
