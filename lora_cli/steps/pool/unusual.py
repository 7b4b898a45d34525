"""What is unusual about adapters, beside the measured ones of the same base in the catalogue."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lora_cli.catalogue.adapters import Catalogue
from lora_cli.checks.spectra import AdapterSpread, Spread, measure
from lora_cli.checks.unusual import FEWEST, Unusual, compare
from lora_cli.formats.config import parse_config
from lora_cli.formats.header import read_header
from lora_cli.formats.skeleton import Skeleton
from lora_cli.formats.store import read_config
from lora_cli.steps.pool.sketched import Copy, copies_of
from lora_cli.steps.pool.verify import Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A verdict, and the most unusual value of its adapter; None where it was not compared.

    `pool` is the number of measured adapters of its base, itself included. `copy` is the nearest adapter of which it
    is a near copy.
    """

    verdict: Verdict
    unusual: Unusual | None
    pool: int
    copy: Copy | None = None


def judge(catalogue: Catalogue, verdicts: Sequence[Verdict], quarantine_z: float | None = None) -> list[Judged]:
    """Compare the measured adapters among `verdicts` with those of their base.

    The result does not depend on the order of the verdicts.

    Args:
        quarantine_z: put the adapters whose |z| is above it in quarantine, and take the other compared ones out of it;
            infinity takes all out of it.
    """
    by_base: defaultdict[str, dict[str, AdapterSpread]] = defaultdict(dict)
    for one in verdicts:
        if one.spreads is not None:
            by_base[one.adapter.base][one.adapter.id] = one.spreads
    found = {base: _beside(_stored(catalogue, base), here) for base, here in by_base.items()}
    sketches = {
        base: {one.adapter.id: one.sketch for one in verdicts if one.adapter.base == base and one.sketch}
        for base in by_base
    }
    copies = {id: copy for base, here in sketches.items() for id, copy in copies_of(catalogue, base, here).items()}
    judged = []
    for one in verdicts:
        compared, pool = found[one.adapter.base] if one.spreads is not None else ({}, 0)
        judged.append(
            Judged(verdict=one, unusual=compared.get(one.adapter.id), pool=pool, copy=copies.get(one.adapter.id))
        )
    return judged if quarantine_z is None else _quarantined(catalogue, judged, quarantine_z)


def beside_measured(
    catalogue: Catalogue, base: str, files: Mapping[str, tuple[Path, Path]], skeleton: Skeleton | None
) -> tuple[dict[str, Unusual], int]:
    """The most unusual value of adapters by their ids, and the size of the pool; ({}, 0) if that is too small.

    `files` are configuration and weights by id. What the catalogue has measured under an id is not measured again.
    """
    stored = _stored(catalogue, base, files)
    if len(stored) < FEWEST:
        return {}, 0
    here: dict[str, AdapterSpread] = {}
    for id, (config, weights) in files.items():
        if id in stored:
            here[id] = stored[id]
        else:
            facts = parse_config(read_config(config.parent) or b"")
            here[id] = measure(weights, read_header(weights), facts, skeleton)
    found, pool = _beside(stored, here)
    return {id: one for id, one in found.items() if one is not None}, pool


def _stored(catalogue: Catalogue, base: str, ids: Iterable[str] = ()) -> dict[str, AdapterSpread]:
    """The measured adapters of a base in the catalogue, those with these `ids` among them."""
    found = catalogue.spreads.of(base, with_=ids)
    return {id: {name: Spread(*values) for name, values in modules.items()} for id, modules in found.items()}


def _beside(
    stored: Mapping[str, AdapterSpread], here: Mapping[str, AdapterSpread]
) -> tuple[dict[str, Unusual | None], int]:
    """The most unusual value of each adapter of `here` among all, none if these are too few; the number of all."""
    pool = {**stored, **here}
    if len(pool) < FEWEST:
        return {}, len(pool)
    found = dict(zip(pool, compare(list(pool.values())), strict=True))
    return {id: found[id] for id in here}, len(pool)


def _quarantined(catalogue: Catalogue, judged: Sequence[Judged], most: float) -> list[Judged]:
    reasons, marked = {}, []
    for one in judged:
        adapter = one.verdict.adapter
        if one.unusual is not None or (most == math.inf and adapter.status == "quarantined"):
            above = one.unusual is not None and abs(one.unusual.z) > most
            reason = f"z {one.unusual.z:.2f} above {most:g}: {one.unusual.in_words()}" if one.unusual and above else ""
            reasons[adapter.id, adapter.commit] = reason
            adapter = replace(adapter, status="quarantined" if above else "ok", reason=reason)
        marked.append(replace(one, verdict=replace(one.verdict, adapter=adapter)))
    catalogue.spreads.quarantine(reasons)
    return marked
