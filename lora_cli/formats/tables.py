"""Tables that people have, as a stream of rows: CSV, JSONL, Parquet. Every fault names file, line and column."""

import csv
import importlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

from lora_cli.errors import DataError, UsageError
from lora_cli.escapes import FORMULAS
from lora_cli.files import open_given
from lora_cli.text import counted, shortened

LONGEST_LINE = 16_000_000
"""The most bytes of a line: what a row may hold in memory."""
_ROWS_AT_ONCE = 2_000
_DELIMITERS = ",;\t"
_PARQUET = b"PAR1"


class Row(NamedTuple):
    """One row: its number in the file, from 1, and its cells by place. Rows of CSV and Parquet share their names."""

    line: int
    names: tuple[str, ...]
    cells: Sequence[Any]


@dataclass(slots=True, kw_only=True)
class Table:
    """An open table, its names in line `head`.

    `renamed` are the columns whose name came again: place from 1, name in the file, name here.
    """

    path: Path
    kind: Literal["csv", "jsonl", "parquet"]
    rows: Iterator[Row]
    head: int = 1
    renamed: list[tuple[int, str, str]] = field(default_factory=list)

    def fault(self, line: int, reason: str, *, column: int | None = None, name: str = "", hint: str = "") -> DataError:
        """The error about a row, and a column of it by its place from 0."""
        row = f"row {line}" if self.kind == "parquet" else f"line {line}"
        parts = [f"{self.path}", row]
        if column is not None:
            parts.append(f"key {name!r}" if self.kind == "jsonl" else f"column {column + 1} {shortened(name)!r}")
        return DataError(f"{', '.join(parts)}: {reason}", hint=hint or "nothing was imported: correct it and run again")


@contextmanager
def open_table(path: Path) -> Iterator[Table]:
    """The table in a file, of the kind that its first bytes show: Parquet, JSON objects line by line, else CSV.

    CSV has its names in the first line and commas, semicolons or tabs between its cells. A column whose name came
    before gets a number, as in pandas: `x`, `x.1`. Memory holds a line, or 2,000 rows of Parquet.

    Raises:
        DataError: no such file, or one that is empty, binary, no UTF-8 or malformed; rows raise it with their number.
        UsageError: Parquet, where pyarrow is not installed.
    """
    try:
        file = open_given(path)
    except FileNotFoundError as error:
        raise DataError(f"no such file: {path}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    with file:
        start = file.peek(len(_PARQUET))[:4096]
        if start.startswith(_PARQUET):
            yield _parquet(path, file)
            return
        text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
        if not text and not start:
            raise DataError(f"{path}: the file is empty", hint="a table has a line of names, then rows")
        if text[:1] == b"[":
            raise DataError(f"{path}, line 1: a list", hint="JSON is read as one object per line (JSONL)")
        if text[:1] == b"{":
            table = Table(path=path, kind="jsonl", rows=iter(()))
            table.rows = _objects(table, file)
        else:
            table = Table(path=path, kind="csv", rows=iter(()))
            table.rows = _cells(table, file)
        yield table


def pyarrow(part: str) -> ModuleType:
    """A module of pyarrow. UsageError, with the extra to install, if there is none."""
    try:
        return importlib.import_module(f"pyarrow{part}")
    except ImportError as error:
        raise UsageError(
            "Parquet needs pyarrow", hint="pip install 'lora-cli[parquet]', or use JSONL or CSV"
        ) from error


def _lines(table: Table, file: BufferedReader) -> Iterator[str]:
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        if b"\0" in line:
            raise table.fault(number, "binary data, not text", hint="save the table as CSV in UTF-8, JSONL or Parquet")
        if len(line) > LONGEST_LINE:
            raise table.fault(number, f"a line of more than {LONGEST_LINE:,} bytes")
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise table.fault(number, "not UTF-8 text", hint="save the file as UTF-8") from error


def _cells(table: Table, file: BufferedReader) -> Iterator[Row]:
    lines = _lines(table, file)
    first = next(lines)
    delimiter = max(_DELIMITERS, key=first.count)

    def again() -> Iterator[str]:
        yield first
        yield from lines

    reader = csv.reader(again(), delimiter=delimiter, strict=True)
    names: tuple[str, ...] = ()
    begin = 1
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                begin = reader.line_num + 1
                continue
            if not names:
                table.head = begin
                names = _named(table, [plain(cell.strip()) for cell in cells])
            elif len(cells) != len(names):
                raise table.fault(
                    begin, f"{counted(len(cells), 'cell')}, but the table has {counted(len(names), 'column')}"
                )
            else:
                yield Row(begin, names, cells)
            begin = reader.line_num + 1
    except csv.Error as error:
        closed = " (is a quote not closed?)" if "limit" in str(error) or "end of data" in str(error) else ""
        raise table.fault(begin, f"malformed CSV: {error}{closed}") from error
    if not names:
        raise DataError(f"{table.path}: the file is empty", hint="a table has a line of names, then rows")


def _objects(table: Table, file: BufferedReader) -> Iterator[Row]:
    for number, line in enumerate(_lines(table, file), start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line, object_pairs_hook=_unique)
        except json.JSONDecodeError as error:
            reason = f"malformed JSON: {error.msg} at column {error.colno}"
            raise table.fault(number, reason, hint="JSON is read as one object per line (JSONL)") from None
        except (ValueError, RecursionError) as error:
            said = str(error) if isinstance(error, _TwiceError) else "a number too long or nesting too deep"
            raise table.fault(number, said) from None
        if not isinstance(found, dict):
            raise table.fault(number, "no JSON object")
        yield Row(number, tuple(found), tuple(found.values()))


class _TwiceError(ValueError):
    """A key that an object has twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for place, (key, _) in enumerate(pairs, start=1):
            if key in seen:
                raise _TwiceError(f"key {shortened(key)!r}, the {place}. of the object, is given twice")
            seen.add(key)
    return found


def _parquet(path: Path, file: BufferedReader) -> Table:
    # Texts that are no UTF-8, dates beyond those of Python and unknown time zones have errors of Python's own.
    errors = (pyarrow(".lib").ArrowException, OSError, ValueError, OverflowError, LookupError)
    try:
        opened = pyarrow(".parquet").ParquetFile(file)
        names = [str(name) for name in opened.schema_arrow.names]
    except errors as error:
        raise DataError(f"{path}: malformed Parquet ({_first_line(error)})") from error
    table = Table(path=path, kind="parquet", rows=iter(()))
    unique = _named(table, names)

    def rows() -> Iterator[Row]:
        number = 0
        try:
            for batch in opened.iter_batches(batch_size=_ROWS_AT_ONCE, use_threads=False):
                for cells in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                    number += 1
                    yield Row(number, unique, cells)
        except errors as error:
            raise table.fault(number + 1, f"malformed Parquet ({_first_line(error)})") from error

    table.rows = rows()
    return table


def _named(table: Table, names: Sequence[str]) -> tuple[str, ...]:
    """The names of columns, with a number where one comes again; remembers these in the table."""
    taken: list[str] = []
    known, again = {*names}, dict[str, int]()
    for place, name in enumerate(names, start=1):
        new, number = name, again.get(name, 0)
        if name and name in again:
            new = f"{name}.{number + 1}"
            while new in known:
                number += 1
                new = f"{name}.{number + 1}"
            known.add(new)
            number += 1
            table.renamed.append((place, name, new))
        again[name] = number
        taken.append(new)
    return tuple(taken)


def plain(cell: str) -> str:
    """A text of CSV without the apostrophe that keeps a spreadsheet from running it as a formula."""
    return cell[1:] if cell[:1] == "'" and cell[1:2] in FORMULAS else cell


def _first_line(error: Exception) -> str:
    return shortened(str(error).split("\n")[0])
