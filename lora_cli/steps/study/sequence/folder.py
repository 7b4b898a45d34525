"""The folder of a sequence: its plan, its cells, and what came of them."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from lora_cli.errors import DataError
from lora_cli.files import read_given, read_regular
from lora_cli.steps.study.folder import RESULT_FILE, Piece, write_failure
from lora_cli.steps.study.sequence.plan import SCHEMA, Plan

PLAN_FILE = "sequence.json"
CELL_SCHEMA = "lora.sequence.cell/1"


@dataclass(frozen=True)
class SequenceFolder:
    """A sequence's folder, which holds all that its cells need but the weights of the base."""

    path: Path

    @cached_property
    def plan(self) -> Plan:
        """The plan. DataError if there is none, or another file in its place."""
        file = self.path / PLAN_FILE
        try:
            plan = msgspec.json.decode(read_given(file), type=Plan)
        except OSError as error:
            raise DataError(f"{self.path}: no folder of a sequence ({error.strerror})") from None
        except (msgspec.DecodeError, RecursionError) as error:
            raise DataError(f"{file}: not the plan of a sequence ({error})") from None
        if plan.schema != SCHEMA:
            raise DataError(f"{file}: not the plan of a sequence ({plan.schema})")
        return plan

    @property
    def device(self) -> str:
        """The device on which its workers compute."""
        return self.plan.base.device

    def cell(self, name: str) -> Path:
        """The folder of a cell."""
        return self.path / "cells" / name

    def done(self, cells: Iterable[Piece]) -> set[str]:
        """The names of the cells that have a result."""
        return {cell.name for cell in cells if (self.cell(cell.name) / RESULT_FILE).is_file()}

    def note_failure(self, name: str, error: str, hint: str) -> None:
        """Keep why a cell could not be done, until it is."""
        write_failure(self.cell(name), name, error, hint)

    def open_needs(self, cells: Iterable[Piece]) -> list[Piece]:
        """Nothing: what the cells of a sequence need are cells."""
        return []

    def result(self, name: str) -> dict[str, Any] | None:
        """The result of a cell, None if it is not done. DataError if it is no result of this cell."""
        file = self.cell(name) / RESULT_FILE
        try:
            found: dict[str, Any] = json.loads(read_regular(file))
            if found["schema"] == CELL_SCHEMA and found["cell"] == name:
                return found
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            pass
        raise DataError(f"{file}: not the result of this cell", hint="remove its folder and run the study again")
