"""Score candidates by their weights, beside those of a target."""

from collections.abc import Callable, Sequence
from pathlib import Path

from lora_cli.catalogue.adapters import Catalogue
from lora_cli.errors import LoraError, NothingMatched, Refused
from lora_cli.formats.base_names import same_base
from lora_cli.formats.reader import OpenAdapter, open_adapter
from lora_cli.formats.store import folder_ref, locate
from lora_cli.names import unpinned
from lora_cli.recipes import SELECTION_METHODS
from lora_cli.records import AdapterRow, Candidates, Progress
from lora_cli.steps.pool.fetch import refused
from lora_cli.steps.pool.lookup import names_of
from lora_cli.steps.pool.select import Scored

# Each group reads the target again; an adapter that cannot be read makes its companions be scored again.
_TOGETHER = 16


def scored_by_weights(
    catalogue: Catalogue,
    by: str,
    target: Path,
    aliases: Sequence[str],
    announce: Callable[[str], None],
    progress: Progress,
    candidates: Candidates,
) -> Scored:
    """The scores of candidates by a method of kind "weights", as far as their weights can be read.

    aliases: other names of the candidates' base model.

    Raises:
        NothingMatched: no weights can be read, or no target. Refused: the target is for another base model.
    """
    goal, function = _target(target), SELECTION_METHODS.load(by)
    [base] = candidates.bases
    if goal.base and base and not same_base(goal.base, base, names_of(catalogue, base, aliases)):
        raise Refused(
            f"the target {goal.ref.id} is for {goal.base}, the candidates are for {base}",
            hint="if these are one model, add the name to base_aliases in lora.toml",
        )
    function([], goal)  # fail on a faulty target before any candidate is blamed
    ids = [unpinned(pinned) for pinned in candidates.pinned]
    rows = {row.id: row for row in catalogue.rows(ids)}
    unfit: dict[str, str] = {}

    def leave_out(id: str, reason: str) -> None:
        unfit[id] = reason
        announce(f"{id} left out: {reason}")

    for adapter, reason in refused(catalogue, [r.ref for r in rows.values()], announce, progress):
        leave_out(adapter.id, reason)
    fit = [row for row in rows.values() if row.id not in unfit]
    scores: dict[str, float] = {}
    progress("comparing weights", 0, len(fit))
    for start in range(0, len(fit), _TOGETHER):
        scores |= _scored(function, fit[start : start + _TOGETHER], goal, leave_out)
        progress("comparing weights", min(start + _TOGETHER, len(fit)), len(fit))
    if not scores:
        raise NothingMatched("no adapter whose weights can be read fits", hint="see lora pool verify")
    return Scored(scores={place: scores[id] for place, id in enumerate(ids) if id in scores}, unreadable=unfit)


def _scored(
    function: Callable[..., list[float]],
    rows: Sequence[AdapterRow],
    target: OpenAdapter,
    leave_out: Callable[[str, str], None],
) -> dict[str, float]:
    """Id → score, without adapters that cannot be read."""
    try:
        scores = function([_opened(row) for row in rows], target)
        return {row.id: score for row, score in zip(rows, scores, strict=True)}
    except LoraError as error:
        if len(rows) == 1:
            leave_out(rows[0].id, error.message.removeprefix(f"{rows[0].id}: "))
            return {}
    half = len(rows) // 2
    return _scored(function, rows[:half], target, leave_out) | _scored(function, rows[half:], target, leave_out)


def _opened(row: AdapterRow) -> OpenAdapter:
    files = locate(row.ref)
    if files is None:
        raise Refused(f"{row.id}: its files are no longer there")
    return open_adapter(files)


def _target(folder: Path) -> OpenAdapter:
    files = locate(folder_ref(folder))
    if files is None:
        raise NothingMatched(
            f"{folder}: no adapter in this folder", hint="give the folder of a LoRA, as train writes it"
        )
    return open_adapter(files)
