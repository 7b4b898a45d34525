"""Coefficients as a PEFT folder: the candidate of a search, as the result of the fit would be written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch

from lora_cli.algebra.lowrank import LowRank
from lora_cli.formats.coefficients import COEFFICIENTS_FILE, coefficients_text
from lora_cli.formats.reader import OpenAdapter
from lora_cli.records import Coefficients
from lora_cli.steps.merge.stream import MergePlan, write_files


@dataclass(frozen=True, slots=True, eq=False)
class _InMemory(OpenAdapter):
    """An adapter with other factors than those in its file: trained ones, or noise."""

    factors: Mapping[str, LowRank] = field(repr=False, kw_only=True)

    @classmethod
    def of(cls, adapter: OpenAdapter, factors: Mapping[str, LowRank]) -> "_InMemory":
        """The adapter with these factors by module, scale folded into B."""
        own = {one.name: getattr(adapter, one.name) for one in fields(adapter) if one.init}
        return cls(**own, factors=factors)

    def read(self, module: str, dtype: torch.dtype | None = None, *, checked: bool = True) -> LowRank:
        """The factors in memory, in place of those in the file."""
        return self.factors[module].to(dtype or torch.float32)


def with_coefficients(
    plan: MergePlan, coefficients: Coefficients, factors: Sequence[Mapping[str, LowRank]] = ()
) -> MergePlan:
    """The plan with these coefficients, and with other factors of the adapters, if they are given in its order."""
    if factors:
        own = dict(zip(coefficients.adapters, factors, strict=True))
        plan = replace(plan, adapters=tuple(_InMemory.of(one, own[one.ref.pinned]) for one in plan.adapters))
    return replace(plan, coefficients=coefficients)


def write_coefficients(coefficients: Coefficients, folder: Path) -> Path:
    """Write `coefficients.json` into a folder; returns the file."""
    file = folder / COEFFICIENTS_FILE
    file.write_text(coefficients_text(coefficients), encoding="utf-8")
    return file


def write_candidate(
    plan: MergePlan, coefficients: Coefficients, factors: Sequence[Mapping[str, LowRank]], folder: Path
) -> None:
    """A new folder with the two PEFT files of a merge with these coefficients, and coefficients.json.

    Coefficients of 0 give an adapter that changes nothing.
    """
    folder.mkdir()
    write_files(with_coefficients(plan, coefficients, factors), folder)
    write_coefficients(coefficients, folder)
