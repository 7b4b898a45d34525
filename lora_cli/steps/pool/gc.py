"""What the caches hold of adapters, that of the Hub and that of conversions, and what of it can go."""

import time
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from lora_cli.catalogue import runs
from lora_cli.catalogue.adapters import Catalogue
from lora_cli.catalogue.rows import Known
from lora_cli.hub.holdings import Held, delete, holdings, is_still
from lora_cli.imports import _cached as conversions
from lora_cli.names import repo_and_folder
from lora_cli.text import counted

_DAY = 86_400.0
_NOT_USED = ("gone", "unusable", "gated", "quarantined")


def survey(catalogue: Catalogue, db: Path, *, unused: int | None = None) -> list[Held]:
    """What the caches hold of adapters that the catalogue knows, each with the reason why it can go, "" to stay.

    Revisions that a selection or the record of a run names stay: `merge --locked` needs them. An unfinished download
    can go once it has not grown for an hour. A conversion of an adapter that no row has can go too, after the same
    time: it is made again where it is needed.

    unused: the days after which a revision that nobody read can go.
    """
    by_repo: defaultdict[str, list[Known]] = defaultdict(list)
    for id, row in catalogue.known(catalogue.ids_of(source="hub", gone=True)).items():
        if repo_and_folder(id) is not None:
            by_repo[row.repo].append(row)
    needed = {(id.partition(":")[0], commit) for id, commit in catalogue.selections.pinned()} | _recorded(db)
    return [
        *(
            replace(held, reason=_reason(held, by_repo[held.repo], unused))
            if (held.repo, held.commit) not in needed
            else held
            for held in holdings(by_repo.keys())
        ),
        *_conversions(catalogue, {commit for _, commit in needed}, unused),
    ]


def clear(chosen: Sequence[Held]) -> int:
    """Delete these parts of the caches, and return the bytes freed."""
    converted = {one.path for one in conversions.held()}
    of_hub = [one for one in chosen if one.path not in converted]
    return delete(of_hub) + conversions.forget([one for one in chosen if one.path in converted])


def _conversions(catalogue: Catalogue, needed: Collection[str], unused: int | None) -> list[Held]:
    """What the cache of conversions holds, under the id of the adapter, or what else it is."""
    if not (found := conversions.held()):
        return []
    rows = {row.commit: (id, row) for id, row in catalogue.known(catalogue.ids_of(source="folder", gone=True)).items()}
    judged = []
    for held in found:
        id, row = rows.get(held.commit, ("a converted adapter", None))
        reason = held.reason
        if not reason and held.commit not in needed:
            if row is not None:
                reason = _reason(held, [row], unused)
            elif is_still(held):
                reason = "in no catalogue" if held.commit else "unfinished conversion"
        judged.append(replace(held, repo=id, reason=reason))
    return judged


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
