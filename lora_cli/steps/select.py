"""Choose adapters from the catalogue."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_cli.adapters.store import folder_ref, locate
from lora_cli.catalogue import Catalogue
from lora_cli.errors import LoraError, NothingMatched, Refused, UsageError
from lora_cli.methods import MethodFolder
from lora_cli.records import Adapter, Progress, silent
from lora_cli.steps.fetch import refused
from lora_cli.steps.lookup import of_one_base

if TYPE_CHECKING:
    from lora_cli.adapters.reader import OpenAdapter

METHODS = MethodFolder("lora_cli.selection_methods", "selection method")


def select(
    catalogue: Catalogue,
    *,
    by: str = "random",
    k: int = 30,
    base: str | None = None,
    where: Sequence[str] = (),
    seed: int = 0,
    max_per_author: int | None = None,
    target: Path | None = None,
    announce: Callable[[str], None],
    progress: Progress = silent,
) -> list[tuple[Adapter, float]]:
    """The k best usable adapters by a selection method, best first, each with its score.

    Equal scores are ordered by a hash of the adapter's name, so that neither the alphabet nor the order of a sync
    decides. An adapter without an author counts against nobody's share.

    Args:
        where: conditions on catalogue columns, all of which must hold.
        target: folder of the adapter that methods which compare weights compare with.
        announce: is told, before weights are downloaded, how many adapters and how many bytes, and which adapters are
            left out because their weights cannot be read.

    Raises:
        UsageError: an unknown method, a bad condition, a target missing, or no base where there are several.
        NothingMatched: no usable adapter fits.
        LoraError: the target cannot be read.
    """
    method = METHODS.get(by)
    if (target is None) == (method.kind == "weights"):
        raise UsageError(f"--by {by} needs --target" if target is None else f"--by {by} takes no --target")
    candidates = of_one_base(catalogue.find(list(where), status="ok"), base)
    if not candidates:
        raise NothingMatched(
            f"no usable adapter of {base}" if base and not where else "no usable adapter fits these conditions",
            hint="see lora pool list, or run lora pool sync",
        )
    function = METHODS.load(by)
    if method.kind == "weights":
        assert target is not None
        goal = _target(target)
        function([], goal)  # what is wrong with the target is no fault of a candidate
        unfit = {row.id: reason for row, reason in refused(catalogue, [r.ref for r in candidates], announce, progress)}
        for id, reason in unfit.items():
            announce(f"{id} left out: {reason}")
        scored = _scored(function, [row for row in candidates if row.id not in unfit], goal, announce)
        if not scored:
            raise NothingMatched("no adapter whose weights can be read fits", hint="see lora pool verify")
    else:
        scored = list(zip(candidates, function(candidates, seed), strict=True))
    ranked = sorted(scored, key=lambda pair: (-pair[1], _lot(pair[0])))
    chosen: list[tuple[Adapter, float]] = []
    taken: Counter[str] = Counter()
    for adapter, score in ranked:
        if len(chosen) == k:
            break
        if max_per_author is not None and adapter.author and taken[adapter.author] >= max_per_author:
            continue
        taken[adapter.author] += 1
        chosen.append((adapter, score))
    return chosen


def _lot(adapter: Adapter) -> str:
    return hashlib.sha256(adapter.ref.pinned.encode()).hexdigest()


def _scored(
    function: Callable[..., list[float]],
    rows: Sequence[Adapter],
    target: "OpenAdapter",
    announce: Callable[[str], None],
) -> list[tuple[Adapter, float]]:
    """Each adapter with its score, but for those that cannot be read."""
    try:
        return list(zip(rows, function([_opened(row) for row in rows], target), strict=True))
    except LoraError as error:
        if len(rows) == 1:
            announce(f"{rows[0].id} left out: {error.message.removeprefix(f'{rows[0].id}: ')}")
            return []
    half = len(rows) // 2
    return [part for rows in (rows[:half], rows[half:]) for part in _scored(function, rows, target, announce)]


def _opened(row: Adapter) -> "OpenAdapter":
    from lora_cli.adapters.reader import open_adapter

    files = locate(row.ref)
    if files is None:
        raise Refused(f"{row.id}: its files are no longer there")
    return open_adapter(files)


def _target(folder: Path) -> "OpenAdapter":
    from lora_cli.adapters.reader import open_adapter

    files = locate(folder_ref(folder))
    if files is None:
        raise NothingMatched(
            f"{folder}: no adapter in this folder", hint="give the folder of a LoRA, as train writes it"
        )
    return open_adapter(files)
