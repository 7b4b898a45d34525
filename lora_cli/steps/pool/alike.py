"""All pairs of adapters by the sketches in the catalogue: no weights are read. numpy and scipy, not torch."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lora_cli.catalogue.adapters import Catalogue
from lora_cli.catalogue.sketches import StoredSketch
from lora_cli.checks.sketch import ERROR, SIZE
from lora_cli.errors import NothingMatched, Refused
from lora_cli.formats.base_names import at_revision, public_base
from lora_cli.names import unpinned
from lora_cli.records import USABLE, Adapter, AdapterRow, Progress, patient, silent
from lora_cli.settings import folder_of
from lora_cli.sources.folder import is_unchanged
from lora_cli.steps.pool.clusters import Similarity
from lora_cli.steps.pool.gather import demand_common_names, demand_one_form_of_projections
from lora_cli.steps.pool.lookup import names_of
from lora_cli.steps.pool.sketched import units
from lora_cli.text import counted

_DIGITS = 6


class Sketched(NamedTuple):
    """Adapters compared by their sketches.

    `rows` are the adapters, `base` the public name of their base model, `unchecked` the reason why names of modules are
    not checked against it, "" if they are.
    """

    similarity: Similarity
    rows: Sequence[AdapterRow]
    base: str
    unchecked: str


class _Measured(NamedTuple):
    """An adapter's sketch, the names of its modules, and the norm of its whole update."""

    sketch: StoredSketch
    modules: Sequence[str]
    norm: float


def by_sketches(
    catalogue: Catalogue,
    names: Sequence[str],
    *,
    base: str | None = None,
    aliases: Sequence[str] = (),
    progress: Progress = silent,
) -> Sketched | str:
    """The cosines of all pairs of adapters, estimated from their sketches; else the reason why that cannot be.

    It can be if the catalogue lists all of them as usable for one base model and has a sketch of each at its commit,
    which pins the weights. Files of a folder that are here must be as they were at the last sync, by size and time.

    Args:
        names: ids of the catalogue, `id@commit`, or folders.
        base: the base model that adapters must be for, None for any; `aliases` are other names of it.
    """
    together = _rows(catalogue, names, base)
    rows: list[AdapterRow] = []
    for name in names:
        row = together.get(name) or _row(catalogue, name, base)
        if row is None:
            return f"{name} is not in the catalogue"
        rows.append(row)
    found = _measured(catalogue, rows, progress)
    without = [row.id for row, one in zip(rows, found, strict=True) if one is None]
    if without:
        have = "has" if len(without) == 1 else "have"
        which = f"{without[0]} the first of them: " if len(without) > 1 else f"{without[0]}: "
        return (
            f"{len(without):,} of {counted(len(rows), 'adapter')} {have} no sketch of the files as they are, "
            f"{which}lora pool sync, then lora pool verify --deep"
        )
    known = [one for one in found if one is not None]
    if fault := _beside(rows, known, base):
        return fault
    asked = base or rows[0].base
    declared = [at_revision(row.base_declared, row.revision) for row in rows]
    public = public_base(asked, names_of(catalogue, asked, aliases), declared)
    unchecked = f"module names are not checked against {public}: its config.json was not here when they were sketched"
    by_base = known[0].sketch.by_base
    return Sketched(similarity=_similarity(rows, known), rows=rows, base=public, unchecked="" if by_base else unchecked)


def _rows(catalogue: Catalogue, names: Sequence[str], base: str | None) -> dict[str, AdapterRow]:
    """The rows of the names that have one meaning, as nearly all do: an id, or `id@commit`. Read at once."""
    plain = [name for name in names if folder_of(name) is None]
    found = catalogue.rows([one for name in plain for one in (name, unpinned(name))], base=base)
    ids, pinned = {row.id: row for row in found}, {row.ref.pinned: row for row in found}
    both = ids.keys() & pinned.keys()
    meant = {name: (pinned if "@" in name else ids).get(name) for name in plain}
    return {name: row for name, row in meant.items() if row is not None and name not in both}


def _row(catalogue: Catalogue, name: str, base: str | None) -> Adapter | None:
    """The row of a name, None where the catalogue has none at this commit."""
    folder = folder_of(name)
    here = None if folder is None else catalogue.at(folder)
    if folder is not None and here is None:
        return None
    try:
        return catalogue.named(name, base=base) if here is None else catalogue.get(here.id, base=base)
    except NothingMatched:
        return None


def _measured(catalogue: Catalogue, rows: Sequence[AdapterRow], progress: Progress) -> list[_Measured | None]:
    """What `verify --deep` stored of each adapter; None where that does not count."""
    at = [(row.id, row.commit) for row in rows]
    sketches, modules = catalogue.sketches.of(at), catalogue.spreads.modules(at)
    found: list[_Measured | None] = []
    report = patient(progress)
    for row in rows:
        sketch = sketches.get(row.id)
        sound = sketch is not None and len(sketch.numbers) == 2 * SIZE and row.status in USABLE
        here = row.source == "hub" or is_unchanged(row)
        names = modules.get(row.id) if sound and here else None
        if sketch is None or names is None or row.norm is None:
            found.append(None)
        else:
            found.append(_Measured(sketch, names, row.norm))
        report("reading sketches", len(found), len(rows))
    return found


def _beside(rows: Sequence[AdapterRow], found: Sequence[_Measured], base: str | None) -> str:
    """The reason why these adapters cannot be compared by what is stored; "" if they can."""
    if {row.base for row in rows} != {base or rows[0].base}:
        return f"the catalogue does not list all of them for {base or 'one base model'}"
    if len({one.sketch.by_base for one in found}) > 1:
        return "some were sketched before the base's config.json was here: lora pool verify --deep"
    if not found[0].sketch.by_base:
        # Only sketches that know the base's own names are sure to have one name for one module.
        named = {frozenset(one.modules): row.id for row, one in zip(rows, found, strict=True)}
        modules = [(id, names) for names, id in named.items()]
        try:
            demand_common_names(modules)
            demand_one_form_of_projections(modules)
        except Refused as refused:
            return refused.message
    return ""


def _similarity(rows: Sequence[AdapterRow], found: Sequence[_Measured]) -> Similarity:
    directions = units([one.sketch for one in found])
    cosines = (directions @ directions.T).astype(np.float64).clip(-1, 1).round(_DIGITS)
    np.fill_diagonal(cosines, directions.any(1))
    return Similarity(
        refs=tuple(row.ref for row in rows),
        cosines=cosines,
        norms=tuple(one.norm for one in found),
        modules=len(set[str]().union(*(one.modules for one in found))),
        error=ERROR,
    )
