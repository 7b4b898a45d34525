"""The only module that prints: results to stdout, messages to stderr, strangers' texts always escaped."""

import csv
import io
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, groupby
from pathlib import Path
from threading import Lock
from typing import Any, Literal, TextIO

from lora_cli.columns import Column, cell_text, cells_of, chosen, markdown_table, on_request, plain_lines, usual
from lora_cli.escapes import as_line, csv_cell, safe
from lora_cli.records import Progress

# Between two columns.
_GAP = 2
# The most entries of a list, or lines of a text, that `record` shows on a terminal.
_MOST_SHOWN = 15
# Tab-separated lines that are written at once.
_AT_ONCE = 1_000
# If a cell needs more lines than this, a minor column is left out.
_MOST_LINES = 3
Form = Literal["table", "tsv", "csv", "json", "jsonl", "md"]
Format = Literal["auto", "quiet"] | Form


def near(path: Path) -> str:
    """A path for messages: relative if it is below the current folder."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) and path != here else str(path)


class Screen:
    """The output of a command. One object per command.

    Args:
        format: "auto" is a table on a terminal and tab-separated lines elsewhere.
        columns: the columns to show, in this order, in place of the usual ones.
    """

    def __init__(self, format: Format = "auto", columns: Sequence[str] = ()) -> None:
        self.format = format
        self.columns = columns

    @property
    def _form(self) -> Format:
        """The format, "table" or "tsv" in place of "auto"."""
        return self.format if self.format != "auto" else "table" if sys.stdout.isatty() else "tsv"

    def rows(
        self,
        schema: str,
        columns: Sequence[Column],
        rows: Sequence[Mapping[str, Any]],
        *,
        identity: str = "id",
        caption: str = "",
        extra: Mapping[str, Any] | None = None,
        sorted_by: str = "",
    ) -> None:
        """Show rows. JSON forms and CSV carry every key of every row; tables and lines the usual columns and the one
        that the rows are sorted by; quiet only `identity`. If the user chose columns, all forms but quiet carry these.
        """
        shown = chosen(columns, self.columns) if self.columns else usual(columns, sorted_by)
        if self.columns and self._form != "quiet":
            keys = [column.key for column in shown]
            found = [dict(zip(keys, cells, strict=True)) for cells in cells_of(shown, rows)]
        else:
            found = [dict(row) for row in rows]
        match self._form:
            case "json":
                _out(json.dumps({"schema": schema, **(extra or {}), "rows": found}, indent=2))
            case "jsonl":
                for fact in found:
                    _out(json.dumps(fact))
            case "csv":
                _out(_csv(found or [{column.key: None for column in shown}], header_only=not rows), end="")
            case "quiet":
                for row in rows:
                    _out(as_line(str(row[identity])))
            case "md":
                _out(markdown_table(shown, rows), end="")
            case "table":
                self._table(shown, rows, caption)
            case _:
                for start in range(0, len(rows), _AT_ONCE):
                    _out(plain_lines(cells_of(shown, rows[start : start + _AT_ONCE])))

    def document(self, schema: str, values: Mapping[str, Any], *, identity: str = "id") -> None:
        """Show one thing: `key<tab>value` lines, or a JSON document; quiet prints only `identity`.

        On a terminal nested values are indented below their key, and long texts and lists are shown in part.
        """
        if self.columns:
            values = {column.key: values[column.key] for column in chosen(on_request(*values), self.columns)}
        match self._form:
            case "json":
                # `value` may be a record with its own schema.
                _out(json.dumps({"schema": schema} | {**values, "schema": schema}, indent=2))
            case "jsonl":
                _out(json.dumps(dict(values)))
            case "csv":
                _out(_csv([values], header_only=False), end="")
            case "quiet":
                _out(as_line(str(values[identity])))
            case "md":
                rows = [{"key": key, "value": value} for key, value in values.items()]
                _out(markdown_table((Column("KEY", "key"), Column("VALUE", "value")), rows), end="")
            case "table":
                for line in _outline(values):
                    _out(line)
            case _:
                _out(plain_lines(values.items()))

    def pieces(self, heading: str, pieces: Sequence[tuple[str, bool]]) -> None:
        """A text in pieces, with `|` between them. Pieces with True are in colour, or in brackets without colour."""
        _out(safe(heading))
        if sys.stdout.isatty() and self._coloured(pieces):
            return
        runs = [("|".join(safe(text) for text, _ in run), out) for out, run in groupby(pieces, lambda one: one[1])]
        _out("|".join(f"[{text}]" if out else text for text, out in runs))

    def _coloured(self, pieces: Sequence[tuple[str, bool]]) -> bool:
        """Print the pieces in colour; False if the terminal has no colour."""
        from rich.console import Console
        from rich.text import Text

        console = Console(markup=False, emoji=False, highlight=False)
        if console.no_color or not console.color_system:
            return False
        styled = [((safe(text), "bold green" if out else ""), ("|", "dim")) for text, out in pieces]
        console.print(Text.assemble(*[*chain.from_iterable(styled)][:-1]), soft_wrap=True)
        return True

    def text(self, text: str) -> None:
        """Print the tool's own text to stdout, unescaped."""
        _out(text, end="")

    def say(self, text: str) -> None:
        """Print one line on stderr. A closed or full stderr is ignored: the work and its exit code matter more."""
        try:
            _write(sys.stderr, f"{safe(text)}\n")
        except OSError:
            # Unwritten text stays in the buffer, and flushing it at exit would fail.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())

    def warn(self, text: str) -> None:
        """Print a warning on stderr."""
        self.say(f"warning: {text}")

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """A Progress that draws bars on stderr when it is a terminal, and nothing otherwise."""
        if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb" or os.environ.get("NO_COLOR"):
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
        lock = Lock()
        with bars:

            def report(what: str, done: int, total: int) -> None:
                with lock:  # threads that wait for the Hub report as well
                    if what not in known:
                        # Work of unknown length ends when other work begins.
                        for open_ended in [name for name, task in known.items() if bars.tasks[task].total is None]:
                            bars.update(known.pop(open_ended), visible=False)
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
        cells = [[cell_text(column.shown(row)) for column in columns] for row in rows]
        widths = _widths(columns, cells, console.width)
        if not widths:
            self._records(columns, cells, console.width)
        else:
            table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
            for column, width in zip(columns, widths, strict=True):
                if width:
                    numbers = column.asked and all(isinstance(column.shown(row), int | float) for row in rows)
                    align = "right" if numbers else column.align
                    table.add_column(Text(column.heading), justify=align, width=width, no_wrap=True)
            for line in cells:
                table.add_row(*(Text("\n".join(_broken(t, w))) for t, w in zip(line, widths, strict=True) if w))
            console.print(table)
        if caption:
            console.print(Text(safe(caption), style="italic"))
        if left_out := [column.heading for column, width in zip(columns, widths, strict=False) if not width]:
            console.print(Text(f"no room for {', '.join(left_out)}: widen the terminal, or see --json", style="italic"))

    def _records(self, columns: Sequence[Column], cells: Sequence[Sequence[str]], room: int) -> None:
        """Print each row as a block of lines, one per column, if a table would not fit."""
        indent = 2 + max(len(column.heading) for column in columns)
        for line in cells:
            for column, text in zip(columns, line, strict=True):
                first, *rest = _broken(text, max(10, room - indent))
                _out("\n".join([column.heading.ljust(indent) + first, *(" " * indent + more for more in rest)]))
            _out("")


def _out(text: str, end: str = "\n") -> None:
    _write(sys.stdout, text + end)


def _write(stream: TextIO, text: str) -> None:
    # In one piece, so that lines of several threads stay whole; at once, so that results and messages keep their order.
    stream.write(text)
    stream.flush()


def _widths(columns: Sequence[Column], cells: Sequence[Sequence[str]], room: int) -> list[int]:
    """The width of each column, 0 for one that is left out; [] if the other columns do not fit side by side.

    Minor columns are left out if there is no room for them, or if wide columns would wrap over too many lines.
    """
    from rich.cells import cell_len

    natural = [max(map(cell_len, (column.heading, *(line[at] for line in cells)))) for at, column in enumerate(columns)]
    least = [
        min(full, max(column.least, len(column.heading))) if column.wide else full
        for column, full in zip(columns, natural, strict=True)
    ]
    shown = list(range(len(columns)))
    for place in reversed([place for place, column in enumerate(columns) if column.minor]):
        widths = _shared_out(natural, least, shown, room - _GAP * len(shown))
        if widths and all(natural[at] <= _MOST_LINES * widths[at] for at in shown):
            break
        shown.remove(place)
    return _shared_out(natural, least, shown, room - _GAP * len(shown))


def _shared_out(natural: Sequence[int], least: Sequence[int], shown: Sequence[int], room: int) -> list[int]:
    """`room` divided among the columns shown, one at a time to those that need more; [] if it is too little."""
    widths = [least[at] if at in shown else 0 for at in range(len(least))]
    spare = room - sum(widths)
    if spare < 0:
        return []
    while spare and (wanting := [at for at in shown if widths[at] < natural[at]]):
        for at in wanting[:spare]:
            widths[at] += 1
        spare -= len(wanting[:spare])
    return widths


def _broken(text: str, width: int) -> list[str]:
    """`text` in lines of at most `width`, broken after spaces and the separators of an id, never inside a number."""
    from rich.cells import cell_len, chop_cells

    lines = [""]
    for word in re.split(r"(?<=[\s/_,:;@=-])|(?<=\.)(?!\d)", text):
        if cell_len(lines[-1] + word.rstrip()) <= width:
            lines[-1] += word
        else:
            lines += chop_cells(word, width)
    return [line.rstrip() for line in lines if line.strip()] or [""]


def _outline(values: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """`key  value` lines, nested values indented below their key, at most `_MOST_SHOWN` entries or lines of each."""
    width = max((len(safe(key)) for key in values), default=0)
    for key, value in values.items():
        head = f"{indent}{safe(key).ljust(width)}"
        if isinstance(value, Mapping) and value:
            yield head.rstrip()
            below = dict([*value.items()][:_MOST_SHOWN])
            yield from _outline(below, indent + "  ")
            yield from _rest(len(value) - len(below), indent)
        elif isinstance(value, list | tuple) and any(isinstance(one, Mapping) for one in value):
            yield head.rstrip()
            for one in value[:_MOST_SHOWN]:
                first, *others = (
                    _outline(one, indent + "    ") if isinstance(one, Mapping) and one else [cell_text(one)]
                )
                yield f"{indent}  - {first.strip()}"
                yield from others
            yield from _rest(len(value) - _MOST_SHOWN, indent)
        elif isinstance(value, list | tuple):
            more = f" … {len(value) - _MOST_SHOWN} more: --json" if len(value) > _MOST_SHOWN else ""
            yield f"{head}  {', '.join(map(cell_text, value[:_MOST_SHOWN])) or '-'}{more}"
        elif isinstance(value, str) and "\n" in value.strip():
            lines = value.strip().split("\n")
            yield head.rstrip()
            for line in lines[:_MOST_SHOWN]:
                yield f"{indent}  {safe(line.expandtabs(4))}".rstrip()
            yield from _rest(len(lines) - _MOST_SHOWN, indent)
        else:
            yield f"{head}  {cell_text(value) if value != {} else '-'}"


def _rest(count: int, indent: str) -> Iterator[str]:
    if count > 0:
        yield f"{indent}  … {count:,} more: --json"


def _csv(rows: Sequence[Mapping[str, Any]], *, header_only: bool) -> str:
    text = io.StringIO()
    keys = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(csv_cell, keys))
    if not header_only:
        writer.writerows([csv_cell(row.get(key)) for key in keys] for row in rows)
    return text.getvalue()
