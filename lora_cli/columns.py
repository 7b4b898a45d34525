"""The columns of a table, the choice among them, and tables in Markdown."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lora_cli.errors import UsageError
from lora_cli.escapes import safe
from lora_cli.text import nearest


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table: its heading, the row's key, and its layout.

    On a narrow terminal `minor` columns are left out, the rightmost first, with a note; `wide` columns wrap over
    several lines of at `least` that many characters; other columns keep their width. No text is ever cut off.

    `show` makes a cell for people from the row; programs get the row's own value, if the row has the key. `of` is the
    key of the fact that a column shortens for people. An `asked` column is shown only if it is asked for.
    """

    heading: str
    key: str
    align: Literal["left", "right"] = "left"
    wide: bool = False
    minor: bool = False
    least: int = 24
    show: Callable[[Mapping[str, Any]], Any] | None = None
    of: str = ""
    asked: bool = False

    def value(self, row: Mapping[str, Any]) -> Any:
        """The cell for programs."""
        return row.get(self.key) if self.key in row or self.show is None else self.show(row)

    def shown(self, row: Mapping[str, Any]) -> Any:
        """The cell for people."""
        return row.get(self.key) if self.show is None else self.show(row)


def cells_of(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """The cells for programs, row by row."""
    return [[column.value(row) for column in columns] for row in rows]


def on_request(*keys: str) -> tuple[Column, ...]:
    """Columns that are shown only if they are asked for."""
    return tuple(Column(key.replace("_", " ").upper(), key, wide=True, asked=True) for key in keys)


def chosen(columns: Sequence[Column], names: Sequence[str]) -> tuple[Column, ...]:
    """The columns that `names` mean, by key or heading, in the order of the names.

    Raises:
        UsageError: an unknown name.
    """
    by_name = {column.heading.lower(): column for column in columns} | {column.key: column for column in columns}
    for name in names:
        if name.lower() not in by_name:
            keys = ", ".join(column.key for column in columns)
            raise UsageError(f"no column {name!r}; {nearest(name.lower(), by_name, f'columns are {keys}')}")
    return tuple(replace(by_name[name.lower()], minor=False) for name in names)


def usual(columns: Sequence[Column], sorted_by: str = "") -> tuple[Column, ...]:
    """The columns that are shown unless the user chooses others, with the one that the rows are sorted by."""
    shown = [one for one in columns if not one.asked]
    if not sorted_by:
        return tuple(shown)
    if not any(sorted_by in (one.key, one.of) for one in shown):
        shown += [one for one in columns if one.key == sorted_by]
    return tuple(replace(one, minor=one.minor and sorted_by not in (one.key, one.of)) for one in shown)


def cell_text(value: Any) -> str:
    """A value as the cell of a table for people, in which a stranger's text is safe."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(value)
    return safe(value)


def plain_lines(rows: Iterable[Iterable[Any]]) -> str:
    """Tab-separated lines: cells as in a table, but with every digit of a number."""
    return "\n".join("\t".join(map(_plain, cells)) for cells in rows)


def _plain(value: Any) -> str:
    return repr(value).removesuffix(".0") if isinstance(value, float) else cell_text(value)


def markdown_table(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> str:
    """A table in Markdown, in which a stranger's text stays text."""
    lines = [[column.heading for column in columns], ["--:" if one.align == "right" else "---" for one in columns]]
    lines += [[markdown_text(cell_text(column.shown(row))) for column in columns] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def markdown_text(text: str) -> str:
    """A stranger's text for Markdown, in which it stays text."""
    return re.sub(r"([\\|<`*\[\]])", r"\\\1", safe(text))
