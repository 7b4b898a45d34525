"""The file of learnt coefficients that `fit` writes and `merge --coef` reads."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_cli.errors import DataError, Refused
from lora_cli.files import read_given
from lora_cli.records import Coefficients

if TYPE_CHECKING:
    from lora_cli.formats.reader import OpenAdapter

COEFFICIENTS_FILE = "coefficients.json"
_SCHEMA = "lora.coefficients/1"


def coefficients_text(coefficients: Coefficients) -> str:
    """The bytes of a coefficients.json."""
    return json.dumps({"schema": _SCHEMA, **coefficients.stored}, indent=1) + "\n"


def read_coefficients(file: Path) -> Coefficients:
    """The coefficients in `file`. DataError for a file without coefficients."""
    try:
        found = json.loads(read_given(file).decode())
        if found.pop("schema") != _SCHEMA:
            raise ValueError(f"no {_SCHEMA}")
        if not all(isinstance(found[key], str) for key in ("granularity", "activation", "task_sha256", "base")):
            raise TypeError("a text that is none")
        found["adapters"] = tuple(map(str, found["adapters"]))
        if not isinstance(found.get("trained", False), bool):
            raise TypeError("a truth that is none")
        if not found["adapters"]:
            raise ValueError("no adapters")
        found["values"] = {module: tuple(map(_numbers, rows)) for module, rows in found["values"].items()}
        return Coefficients(**found)
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise DataError(f"{file}: no coefficients", hint=f"give the {COEFFICIENTS_FILE} that lora fit wrote") from None


def demand_fitting(coefficients: Coefficients, adapters: "Sequence[OpenAdapter]") -> None:
    """Refused unless the coefficients are for exactly these adapters, modules and ranks, as they are."""
    if coefficients.trained:
        raise Refused(
            "the coefficients belong to factors that the fit trained, not to the adapters as they are",
            hint="use the folder that the fit wrote",
        )
    given, learnt = {adapter.ref.pinned for adapter in adapters}, set(coefficients.adapters)
    if extra := sorted(given - learnt):
        raise Refused(f"the coefficients have no entry for {extra[0]}", hint="leave it out, or fit with it")
    if missing := sorted(learnt - given):
        raise Refused(f"the coefficients need {missing[0]}, which was not given", hint="name this adapter too")
    for adapter in adapters:
        place = coefficients.adapters.index(adapter.ref.pinned)
        for module, factors in adapter.modules.items():
            rows = coefficients.values.get(module, ())
            count = len(rows[place]) if place < len(rows) else 0
            if count not in (1, factors.rank):
                raise Refused(
                    f"the coefficients have {count} values for {adapter.ref.id} in {module}, "
                    f"whose rank is {factors.rank}"
                )


def _numbers(row: Any) -> tuple[float, ...]:
    if not all(type(value) in (int, float) for value in row):
        raise TypeError("a coefficient that is no number")
    numbers = tuple(float(value) for value in row)
    if not all(map(math.isfinite, numbers)):
        raise ValueError("a coefficient that is no finite number")
    return numbers
