"""The only printer: results to stdout, talk to stderr, and nothing a stranger wrote reaches a terminal raw."""

import csv
import io
import json
import os
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lora_cli.records import Progress

Format = Literal["auto", "json", "jsonl", "csv", "quiet"]

# Bidirectional controls and zero-width characters print as nothing and change how the text around them reads.
_INVISIBLE = frozenset(
    [*range(0x200B, 0x2010), *range(0x2028, 0x202F), *range(0x2060, 0x2070), 0x00AD, 0x061C, 0x180E, 0xFEFF]
)


def safe(text: object) -> str:
    """`text` with every character that does not print shown as an escape (\\x1b, \\u202e); spaces stay."""
    out = []
    for char in str(text):
        code = ord(char)
        category = unicodedata.category(char)
        if char == " " or (category[0] not in "CZ" and code not in _INVISIBLE):
            out.append(char)
        elif code < 0x100:
            out.append(f"\\x{code:02x}")
        elif code < 0x10000:
            out.append(f"\\u{code:04x}")
        else:
            out.append(f"\\U{code:08x}")
    return "".join(out)


def percent(share: float) -> str:
    """A share in percent that never rounds a loss away: "100 %" means all of it, to rounding noise."""
    return "100 %" if share >= 1 - 1e-6 else f"{min(share, 0.999):.1%}".replace("%", " %")


def near(path: Path) -> str:
    """A path as people want to read it: relative where it lies below the current folder."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) and path != here else str(path)


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table: its heading, the key of the row it shows, and how it reads.

    On a narrow terminal `minor` columns are left out, the rightmost first, and `wide` ones break over several lines,
    at `least` so many characters each; the others keep their width.
    """

    heading: str
    key: str
    align: Literal["left", "right"] = "left"
    wide: bool = False
    minor: bool = False
    least: int = 24


class Screen:
    """Where a command shows its result. One object per command.

    Args:
        format: "auto" is a table on a terminal and tab-separated lines elsewhere.
    """

    def __init__(self, format: Format = "auto") -> None:
        self.format = format

    def rows(
        self,
        schema: str,
        columns: Sequence[Column],
        rows: Sequence[Mapping[str, Any]],
        *,
        identity: str = "id",
        caption: str = "",
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Show rows. JSON forms carry every key of every row; tables only `columns`; quiet only `identity`."""
        if self.format == "json":
            _out(json.dumps({"schema": schema, **(extra or {}), "rows": [dict(row) for row in rows]}, indent=2))
        elif self.format == "jsonl":
            for row in rows:
                _out(json.dumps(dict(row)))
        elif self.format == "csv":
            _out(_csv(rows or [{column.key: None for column in columns}], header_only=not rows), end="")
        elif self.format == "quiet":
            for row in rows:
                _out(safe(row[identity]))
        elif _on_terminal():
            self._table(columns, rows, caption)
        else:
            for row in rows:
                _out("\t".join(_cell(row.get(column.key)) for column in columns))

    def document(self, schema: str, values: Mapping[str, Any], *, identity: str = "id") -> None:
        """Show one thing: `key<tab>value` lines, or a JSON document; quiet prints only `identity`."""
        if self.format == "json":
            # What is shown may be a record with a schema of its own.
            _out(json.dumps({"schema": schema} | {**values, "schema": schema}, indent=2))
        elif self.format == "jsonl":
            _out(json.dumps(dict(values)))
        elif self.format == "csv":
            _out(_csv([values], header_only=False), end="")
        elif self.format == "quiet":
            _out(safe(values[identity]))
        else:
            width = max((len(key) for key in values), default=0) if _on_terminal() else 0
            for key, value in values.items():
                _out(f"{key.ljust(width)}  {_cell(value)}" if width else f"{key}\t{_cell(value)}")

    def text(self, text: str) -> None:
        """Text that the tool itself made, to stdout as it is."""
        _out(text, end="")

    def say(self, text: str) -> None:
        """One line of talk on stderr."""
        print(safe(text), file=sys.stderr)

    def warn(self, text: str) -> None:
        """One line on stderr that asks for attention."""
        self.say(f"warning: {text}")

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """A Progress that draws bars on stderr when it is a terminal, and nothing otherwise."""
        if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
            yield lambda what, done, total: None
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        bars = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        known: dict[str, Any] = {}
        with bars:

            def report(what: str, done: int, total: int) -> None:
                if what not in known:
                    known[what] = bars.add_task(safe(what), total=total or None)
                bars.update(known[what], completed=done, total=total or None)
                if total and done >= total:
                    bars.update(known.pop(what), visible=False)

            yield report

    def _table(self, columns: Sequence[Column], rows: Sequence[Mapping[str, Any]], caption: str) -> None:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        console = Console(markup=False, emoji=False, highlight=False)
        cells = [[_cell(row.get(column.key)) for column in columns] for row in rows]
        shown = _fitting(columns, cells, console.width)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        if caption:
            table.caption, table.caption_justify = Text(safe(caption)), "left"
        for place in shown:
            column = columns[place]
            table.add_column(Text(column.heading), justify=column.align, overflow="fold", no_wrap=not column.wide)
        for line in cells:
            table.add_row(*(Text(line[place]) for place in shown))
        console.print(table)


def _on_terminal() -> bool:
    return sys.stdout.isatty()


def _out(text: str, end: str = "\n") -> None:
    # Flushed, so that in a log results and talk stand in the order in which they came.
    print(text, end=end, flush=True)


def _fitting(columns: Sequence[Column], cells: Sequence[Sequence[str]], width: int) -> list[int]:
    """The places of the columns that fit side by side; a wide one needs no more than its `least`."""
    need = []
    for place, column in enumerate(columns):
        longest = max(len(text) for text in (column.heading, *(line[place] for line in cells)))
        need.append(2 + (min(longest, column.least) if column.wide else longest))
    shown = list(range(len(columns)))
    for place in reversed(range(len(columns))):
        if sum(need[at] for at in shown) > width and columns[place].minor:
            shown.remove(place)
    return shown


def _cell(value: Any) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(value)
    return safe(value)


def _csv(rows: Sequence[Mapping[str, Any]], *, header_only: bool) -> str:
    text = io.StringIO()
    keys = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    writer.writeheader()
    if not header_only:
        for row in rows:
            writer.writerow({key: _csv_cell(value) for key, value in row.items()})
    return text.getvalue()


def _csv_cell(value: Any) -> Any:
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(value)
    return safe(value) if isinstance(value, str) else value
