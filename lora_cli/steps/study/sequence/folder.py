"""The folder of a sequence: its plan, its cells, and what came of them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import msgspec

from lora_cli.errors import DataError
from lora_cli.files import read_given
from lora_cli.steps.study.folder import RESULT_FILE, Answer, Piece, WorkFolder
from lora_cli.steps.study.sequence.plan import SCHEMA, Cell, Plan, rows_of, shard_of

PLAN_FILE = "sequence.json"
CELL_SCHEMA = "lora.sequence.cell/1"


class _Scores(msgspec.Struct):
    """The scores on one task, as far as tables read them."""

    value: float
    answers: Annotated[list[Answer], msgspec.Meta(min_length=1)]


class _Result(msgspec.Struct):
    """A result, as far as tables read it."""

    schema: str
    cell: str
    tasks: dict[str, _Scores]


@dataclass(frozen=True)
class SequenceFolder(WorkFolder):
    """A sequence's folder, which holds all that its cells need but the weights of the base."""

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

    def planned(self) -> list[Cell]:
        """Every cell of the plan."""
        return self.plan.cells()

    def shard(self, part: tuple[int, int]) -> list[Cell]:
        """Whole rows, with what they need."""
        return shard_of(self.planned(), part)

    def most_shards(self, cells: Sequence[Piece]) -> int:
        """One per row of the plan."""
        return min(len(cells), len(rows_of(self.planned())))

    def open_needs(self, cells: Iterable[Piece]) -> list[Piece]:
        """Nothing: what the cells of a sequence need are cells."""
        return []

    def result(self, name: str) -> dict[str, Any] | None:
        """The result of a cell, None if it is not done. DataError if it is no result of this cell."""
        try:
            data = self.result_bytes(name)
            result = msgspec.json.decode(data, type=_Result)
            known = {stage.name for stage in self.plan.tasks} <= result.tasks.keys()
            if result.schema == CELL_SCHEMA and result.cell == name and known:
                found: dict[str, Any] = msgspec.json.decode(data)
                return found
        except FileNotFoundError:
            return None
        except (msgspec.DecodeError, RecursionError):
            pass
        file = self.cell(name) / RESULT_FILE
        raise DataError(f"{file}: not the result of this cell", hint="remove its folder and run the study again")
