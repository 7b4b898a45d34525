"""The catalogue as a file: adapters and scores as JSONL, CSV or Parquet, streamed."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, Literal

import msgspec

from lora_cli.catalogue import dump
from lora_cli.errors import NothingMatched, UsageError
from lora_cli.escapes import csv_cell
from lora_cli.formats.tables import pyarrow
from lora_cli.records import Exported, Progress, patient, silent
from lora_cli.redaction import redacted

Form = Literal["jsonl", "csv", "parquet"]
What = Literal["all", "adapters", "scores"]
_GROUP = 1_000
"""The rows of a group in a Parquet file, which are in memory together."""
_WHOLE = {"rank", "modules", "layers", "parameters", "bytes", "downloads", "likes", "n"}
_REAL = {"alpha", "scale", "norm", "value"}


class Export:
    """An export of a catalogue, written as it is read; `found` counts what was written so far.

    Args:
        what: the adapters, their newest scores, or both, first the adapters.
        where: conditions on adapters, for their scores too.

    Raises:
        UsageError: two tables in one file of CSV or Parquet; an unknown column in a condition; no pyarrow.
        NothingMatched: nothing to write. It is found before anything is written.
    """

    def __init__(
        self, db: Path, form: Form, what: What, where: Sequence[str] = (), progress: Progress = silent
    ) -> None:
        if what == "all" and form != "jsonl":
            raise UsageError(f"{form} holds one table", hint="name it: --what adapters or --what scores")
        self.db, self.form, self.what, self.where = db, form, what, where
        self.found = Exported()
        self._progress = patient(progress)
        if not any(next(batches, None) for _, batches in self._tables()):
            nothing = (
                "adapter fits these conditions" if where else f"{'score' if what == 'scores' else 'adapter'} is known"
            )
            raise NothingMatched(f"no {nothing}", hint="lora pool list shows all")

    def text(self) -> Iterator[str]:
        """The lines of JSONL or CSV, many at once, all in ASCII but for the letters of CSV."""
        for names, batches in self._tables():
            yield _csv_lines([names]) if self.form == "csv" else ""
            for batch in batches:
                yield _csv_lines(batch) if self.form == "csv" else _json_lines(names, batch)

    def write(self, file: BinaryIO) -> None:
        """Write the export into an open file."""
        if self.form == "parquet":
            self._parquet(file)
            return
        for part in self.text():
            file.write(part.encode())

    def _tables(self) -> Iterator[tuple[Sequence[str], Iterator[list[tuple[Any, ...]]]]]:
        """The names of columns and the batches of rows of each table."""
        long = self.form != "csv"
        if self.what != "scores":
            batches = dump.adapters(self.db, self.where, long=long)
            yield dump.FACTS if long else dump.FACTS[:-2], self._counted(batches, "adapters")
        if self.what != "adapters":
            yield dump.SCORES, self._counted(dump.scores(self.db, self.where), "scores")

    def _counted(self, batches: Iterator[list[tuple[Any, ...]]], what: str) -> Iterator[list[tuple[Any, ...]]]:
        for batch in batches:
            yield batch
            self.found.count(what, len(batch))
            self._progress(f"writing {what}", getattr(self.found, what), 0)

    def _parquet(self, file: BinaryIO) -> None:
        arrow = pyarrow("")
        kinds = {"rslora": arrow.bool_(), **dict.fromkeys(("target_modules", "datasets"), arrow.list_(arrow.string()))}
        for names, batches in self._tables():
            schema = arrow.schema([(name, kinds.get(name) or _kind(arrow, name)) for name in names])
            with pyarrow(".parquet").ParquetWriter(file, schema) as writer:
                rows = chain.from_iterable(batches)
                while batch := list(islice(rows, _GROUP)):
                    columns = [
                        _column(name, values) for name, values in zip(names, zip(*batch, strict=True), strict=True)
                    ]
                    arrays = [
                        arrow.array(column, type=field.type) for column, field in zip(columns, schema, strict=True)
                    ]
                    writer.write_batch(arrow.record_batch(arrays, schema=schema))


def _json_lines(names: Sequence[str], batch: Sequence[Sequence[Any]]) -> str:
    lines = []
    for row in batch:
        values = dict(zip(names, row, strict=True))
        ranks = values.pop("ranks", None)
        if ranks is not None:
            values |= {"rslora": bool(values["rslora"])}
            values |= {name: json.loads(values[name]) for name in ("target_modules", "datasets")}
        found = msgspec.json.encode(values)
        # msgspec is ten times as quick, but leaves letters outside ASCII as they are.
        text = redacted(found.decode() if found.isascii() else json.dumps(values, separators=(",", ":")))
        lines.append(text if ranks is None else f'{text[:-1]},"ranks":{_ranks(ranks)}}}')
    return "\n".join(lines) + "\n"


@lru_cache(maxsize=1024)
def _ranks(text: str) -> str:
    """The ranks of modules as JSON on one line. Most adapters of a base share them, and they are long."""
    return redacted(json.dumps(json.loads(text), separators=(",", ":")))


def _csv_lines(batch: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([csv_cell(value) for value in row] for row in batch)
    return text.getvalue()


def _kind(arrow: Any, name: str) -> Any:
    return arrow.int64() if name in _WHOLE else arrow.float64() if name in _REAL else arrow.string()


def _column(name: str, values: Sequence[Any]) -> Sequence[Any]:
    if name == "rslora":
        return [bool(value) for value in values]
    if name in ("target_modules", "datasets"):
        return [json.loads(value) for value in _without_secrets(values)]
    if name == "ranks":
        return [_ranks(value) for value in values]
    return values if name in _WHOLE or name in _REAL else _without_secrets(values)


def _without_secrets(values: Sequence[str]) -> Sequence[str]:
    joined = "\n".join(values)
    return values if redacted(joined) == joined else [redacted(value) for value in values]
