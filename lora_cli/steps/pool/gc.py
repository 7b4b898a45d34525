"""What the Hub's cache holds of the catalogue's adapters, and what of it can go."""

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lora_cli.catalogue import runs
from lora_cli.catalogue.adapters import Catalogue
from lora_cli.catalogue.rows import Known
from lora_cli.hub.holdings import Held, holdings, is_still
from lora_cli.names import repo_and_folder
from lora_cli.text import counted

_DAY = 86_400.0
_NOT_USED = ("gone", "unusable", "gated", "quarantined")


def survey(catalogue: Catalogue, db: Path, *, unused: int | None = None) -> list[Held]:
    """What the cache holds of repositories that the catalogue knows, each with the reason why it can go, "" to stay.

    Revisions that a selection or the record of a run names stay: `merge --locked` needs them. An unfinished download
    can go once it has not grown for an hour.

    unused: the days after which a revision that nobody read can go.
    """
    by_repo: defaultdict[str, list[Known]] = defaultdict(list)
    for id, row in catalogue.known(catalogue.ids_of(source="hub", gone=True)).items():
        if repo_and_folder(id) is not None:
            by_repo[row.repo].append(row)
    needed = {(id.partition(":")[0], commit) for id, commit in catalogue.selections.pinned()} | _recorded(db)
    return [
        replace(held, reason=_reason(held, by_repo[held.repo], unused))
        if (held.repo, held.commit) not in needed
        else held
        for held in holdings(by_repo.keys())
    ]


def _reason(held: Held, rows: Sequence[Known], unused: int | None) -> str:
    if not held.commit:
        return "unfinished download" if is_still(held) else ""
    here = [row for row in rows if row.commit == held.commit]
    if not here:
        return "older revision" if any(row.status not in _NOT_USED for row in rows) else rows[0].status
    if all(row.status in _NOT_USED for row in here):
        return here[0].status
    if unused is not None and (days := int((time.time() - held.used) / _DAY)) >= unused:
        return f"unused for {counted(days, 'day')}"
    return ""


def _recorded(db: Path) -> set[tuple[str, str]]:
    """Repository and commit of every input of a recorded run."""
    found = set()
    for run in runs.all_inputs(db):
        id, _, commit = run.rpartition("@")
        found.add((id.partition(":")[0], commit))
    return found
