"""The answers of a pool's adapters in one file, lent a few adapters at a time to an evaluation."""

import json
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from lora_cli.errors import OutputError
from lora_cli.files import open_regular
from lora_cli.outputs import hold, whole_file


class PoolRows:
    """The JSONL file `path` of evaluation rows, to which rows are only added.

    In memory are the places of the rows alone. A process that is killed leaves rows in the file that was lent; the next
    one takes them over. Only one process at a time has the file: OutputError for another one, for a file that cannot be
    written, or that holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lent = path.with_name(f"{path.stem}-lent{path.suffix}")
        self._places: dict[str, dict[tuple[str, str], int]] = {}

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written ({error.strerror})") from error
        self._file: BinaryIO = os.fdopen(descriptor, "r+b")
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OutputError(f"{self.path}: not a file", hint="move it away")
            if not hold(descriptor, without_locks=True):
                raise OutputError(f"{self.path}: another process evaluates the same task", hint="wait until it ends")
            self._read()
            self._take_back()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @contextmanager
    def lent(self, systems: Iterable[str]) -> Iterator[Path]:
        """A file with the rows of these systems, whose new rows are taken over at the end, also after an error."""
        with whole_file(self._lent) as file:
            for place in sorted(place for system in systems for place in self._places.get(system, {}).values()):
                self._file.seek(place)
                file.write(self._file.readline())
        try:
            yield self._lent
        finally:
            self._take_back()

    def _read(self) -> None:
        """Note the places of all rows. Text after the last line break is a row whose writing was interrupted."""
        place = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                self._file.truncate(place)
                break
            self._know(line, place)
            place += len(line)

    def _take_back(self) -> None:
        with suppress(FileNotFoundError), open_regular(self._lent) as file:
            for line in file:
                if line.endswith(b"\n"):
                    place = self._file.seek(0, os.SEEK_END)
                    if self._know(line, place):
                        self._file.write(line)
            self._file.flush()
            self._lent.unlink()

    def _know(self, line: bytes, place: int) -> bool:
        """Note the place of a row; False if the file has the row already."""
        try:
            row = json.loads(line)
            identity = str(row["id"]), str(row["key"])
            known = self._places.setdefault(str(row["system"]), {})
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise OutputError(f"{self.path}: not a file of evaluation rows", hint="move it away") from error
        return known.setdefault(identity, place) == place
