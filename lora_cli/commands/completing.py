"""Shell completions for an argument: ids, selections, runs and columns, from the catalogue and without torch."""

import re
from collections.abc import Callable, Sequence
from functools import wraps

from lora_cli.catalogue.where import COLUMNS
from lora_cli.errors import LoraError
from lora_cli.settings import load

_MOST = 200
"""The most completions to offer: about one screen."""

Complete = Callable[[str], list[str]]


def _quiet(complete: Complete) -> Complete:
    """`complete`, but without an error if the catalogue cannot be read: a shell has no place for a message."""

    @wraps(complete)
    def offered(incomplete: str) -> list[str]:
        try:
            return complete(incomplete)
        except LoraError:
            return []

    return offered


@_quiet
def adapters(incomplete: str) -> list[str]:
    """Ids of the catalogue with this prefix."""
    from lora_cli.catalogue.adapters import Catalogue

    with Catalogue(load().db) as catalogue:
        return catalogue.ids_from(incomplete, _MOST)


@_quiet
def selections(incomplete: str) -> list[str]:
    """Names of selections with this prefix, the newest first."""
    from lora_cli.catalogue.adapters import Catalogue

    with Catalogue(load().db) as catalogue:
        return [name for name in catalogue.selections.names() if name.startswith(incomplete)][:_MOST]


@_quiet
def runs(incomplete: str) -> list[str]:
    """Ids of runs with this prefix, the newest first."""
    from lora_cli.catalogue.runs import all_runs

    return [str(run["id"]) for run in all_runs(load().db, limit=_MOST) if str(run["id"]).startswith(incomplete)]


def columns(names: Sequence[str]) -> Complete:
    """The completion of a list of columns with commas between, among `names`."""

    def offered(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        return [f"{before}{comma}{name}" for name in names if name.startswith(last)]

    return offered


def sorting(incomplete: str) -> list[str]:
    """Columns to sort by."""
    return [name for name in COLUMNS if name.startswith(incomplete)]


@_quiet
def conditions(incomplete: str) -> list[str]:
    """Columns, and after `COLUMN OP` the most frequent values in the catalogue; after a comma further ones."""
    written = re.fullmatch(r"(\w+)([=!<>~]+)(.*,)?(.*)", incomplete)
    if written is None:
        return [f"{name}=" for name in COLUMNS if name.startswith(incomplete)]
    column, operator, before, value = written.groups("")
    if column not in COLUMNS:
        return []
    from lora_cli.catalogue.adapters import Catalogue

    with Catalogue(load().db) as catalogue:
        return [f"{column}{operator}{before}{found}" for found in catalogue.values_of(column, value, _MOST)]
