"""Choose adapters from the catalogue."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_cli.adapters.store import folder_ref, locate
from lora_cli.catalogue import Catalogue
from lora_cli.errors import NothingMatched, Refused, UsageError
from lora_cli.methods import MethodFolder
from lora_cli.records import Adapter, Progress, silent
from lora_cli.steps.fetch import bring

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
        announce: is told, before weights are downloaded, how many adapters and how many bytes.

    Raises:
        UsageError: an unknown method, a bad condition, or a target missing.
        NothingMatched: no usable adapter fits.
    """
    method = METHODS.get(by)
    if (target is None) == (method.kind == "weights"):
        raise UsageError(f"--by {by} needs --target" if target is None else f"--by {by} takes no --target")
    candidates = [row for row in catalogue.find(list(where), status="ok") if base is None or row.base == base]
    if not candidates:
        raise NothingMatched(
            f"no usable adapter of {base}" if base and not where else "no usable adapter fits these conditions",
            hint="see lora pool list, or run lora pool sync",
        )
    function = METHODS.load(by)
    if method.kind == "weights":
        assert target is not None
        bring(catalogue, [row.ref for row in candidates], announce, progress)
        scores = function(_opened(candidates), _target(target))
    else:
        scores = function(candidates, seed)
    ranked = sorted(zip(candidates, scores, strict=True), key=lambda pair: (-pair[1], _lot(pair[0])))
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


def _opened(candidates: Sequence[Adapter]) -> "list[OpenAdapter]":
    from lora_cli.adapters.reader import open_adapter

    opened = []
    for row in candidates:
        files = locate(row.ref)
        if files is None:
            raise Refused(f"{row.id}: its files are no longer there", hint="run lora pool sync")
        opened.append(open_adapter(files))
    return opened


def _target(folder: Path) -> "OpenAdapter":
    from lora_cli.adapters.reader import open_adapter

    files = locate(folder_ref(folder))
    if files is None:
        raise NothingMatched(
            f"{folder}: no adapter in this folder", hint="give the folder of a LoRA, as train writes it"
        )
    return open_adapter(files)
