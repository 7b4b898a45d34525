"""`lora pool verify`: check adapters afresh."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_cli.catalogue.where import COLUMNS
from lora_cli.columns import Column, on_request
from lora_cli.commands.options import Catalogued, Command, Listing, examples, with_flags
from lora_cli.commands.pool.shared import Alias, facts
from lora_cli.errors import NothingMatched, Refused, UsageError
from lora_cli.records import USABLE, Adapter, Progress
from lora_cli.screen import Screen
from lora_cli.settings import folder_of, folders_like
from lora_cli.text import meant, percent

if TYPE_CHECKING:
    from lora_cli.catalogue.adapters import Catalogue
    from lora_cli.checks.spectra import AdapterSpread
    from lora_cli.steps.pool.unusual import Judged

_START = (
    Column("ADAPTER", "id", wide=True),
    Column("STATUS", "status"),
    Column("BASE", "base", minor=True),
    Column("MATCH", "base_match", minor=True),
    Column("COVERAGE", "coverage", "right", minor=True, show=lambda row: _share(row["coverage"])),
    Column("NORM", "norm", "right", minor=True),
)
_EXTRA = ("effective_rank", "copy_of", "copy_cosine")
_COMPARED = ("z", "statistic", "module", "value", "usual_low", "usual_high", "pool")
_OTHERS = (
    *on_request(*(key for key in COLUMNS if key not in ("id", "status", "base", "base_match", "norm", "reason"))),
    *on_request("ranks", "card"),
)
_VERDICTS = (*_START, Column("REASON", "reason", wide=True), *_OTHERS, *on_request(*_COMPARED))
_DEEP = (
    *_START,
    Column("Z", "z", "right", show=lambda row: None if row["z"] is None else f"{row['z']:.1f}"),
    Column("FINDING", "finding", wide=True, show=lambda row: row["reason"] or _finding(row)),
    *_OTHERS,
    *on_request("reason", *_COMPARED[1:], *_EXTRA),
)

Named = Annotated[
    list[str] | None,
    typer.Argument(help="Ids or folders, - for stdin.", show_default="usable ones whose weights are here"),
]


def verify(
    adapter: Named = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Read the weights too: hash, norm, NaN, zero, and what is unusual.")
    ] = False,
    quarantine_z: Annotated[
        float | None,
        typer.Option(
            "--quarantine-z",
            help="With --deep: quarantine adapters whose |z| is above this, lift that of the others named.",
            min=0,
        ),
    ] = None,
    min_norm: Annotated[
        float, typer.Option("--min-norm", help="With --deep: note adapters whose norm is not above this.")
    ] = 1.0,
    max_norm: Annotated[
        float, typer.Option("--max-norm", help="With --deep: refuse adapters whose norm is above this.")
    ] = 1000.0,
    jobs: Annotated[int, typer.Option("--jobs", help="Adapters at a time.", min=1, max=64)] = 4,
    force: Annotated[bool, typer.Option("--force", help="With --deep: measure again what was measured.")] = False,
    alias: Alias = None,
    *,
    setup: Catalogued,
    listing: Annotated[Listing, _DEEP],
) -> None:
    """Check adapters afresh, ignoring the catalogue, and show the share of modules that fit the base model.

    Folders need not be in the catalogue. Weights of adapters that the catalogue lists as unusable are read without
    --deep too. Every adapter gets a row; exit code 5 if one is refused or quarantined.

    --deep also compares the updates, the most unusual first: norm, concentration (share of the first singular
    direction) and entropy of each module, as robust z-scores beside the measured adapters of the base. It says what is
    unusual; a backdoor need not be. select leaves out adapters in quarantine.

    What --deep measures is stored adapter by adapter: a rerun takes it up where the bytes are the same. With it goes a
    sketch of the update, for near copies, select --dedupe and the map of the report.
    """
    from lora_cli.catalogue.adapters import Catalogue
    from lora_cli.commands.chosen import expand
    from lora_cli.hub.client import Hub
    from lora_cli.steps.pool.lookup import names_of
    from lora_cli.steps.pool.unusual import judge
    from lora_cli.steps.pool.verify import Norms
    from lora_cli.steps.pool.verify_all import Checking, verify_all

    if quarantine_z is not None and not deep:
        raise UsageError("--quarantine-z needs --deep")
    screen, settings = listing.screen(), setup.load()
    with Catalogue(settings.db) as catalogue, screen.progress() as progress:
        how = Checking(
            base=settings.base or "",
            aliases=names_of(catalogue, settings.base, [*settings.base_aliases, *(alias or ())]),
            deep=deep,
            norms=Norms(least=min_norm, most=max_norm),
            jobs=jobs,
            force=force,
        )
        texts = list(dict.fromkeys(expand(adapter))) if adapter else _here(catalogue, settings.base)
        rows = [_adapter_or_folder(catalogue, text, progress) for text in texts]
        verdicts = verify_all(catalogue, rows, how, hub=Hub(progress=progress), progress=progress)
        judged = judge(catalogue, verdicts, quarantine_z) if deep else None
        notes = [*_copies(judged), *_not_compared(catalogue, judged)] if judged is not None else []
    if judged is None:
        shown = [{**facts(one.adapter), "coverage": one.coverage} for one in verdicts]
        screen.rows("lora.pool.verify/1", _VERDICTS, shown)
    else:
        shown = [_row(one) for one in sorted(judged, key=lambda one: -abs(one.unusual.z) if one.unusual else 0)]
        screen.rows("lora.pool.verify/1", _DEEP, shown)
        for line in notes:
            screen.say(line)
    _sum_up(screen, shown, deep)


def _here(catalogue: "Catalogue", base: str | None) -> list[str]:
    """The usable adapters whose weights are on this machine. NothingMatched for none."""
    from lora_cli.formats.store import locate

    found = [row.id for row in catalogue.find(base=base) if row.status in USABLE and locate(row.ref) is not None]
    if not found:
        raise NothingMatched(
            "no weights of usable adapters are on this machine", hint="lora pool fetch ID, or name some"
        )
    return found


def _row(judged: "Judged") -> dict[str, Any]:
    """A row of --deep: the verdict, and the most unusual value beside the pool."""
    found, verdict = judged.unusual, judged.verdict
    compared = dict.fromkeys(_COMPARED) | {"pool": judged.pool}
    if found is not None:
        compared |= {"z": found.z, "statistic": found.statistic, "module": found.module, "value": found.value}
        compared |= {"usual_low": found.low, "usual_high": found.high}
    copy = judged.copy
    extra = (
        _effective_rank(verdict.adapter, verdict.spreads or {}),
        copy.id if copy else None,
        copy.cosine if copy else None,
    )
    return {
        **facts(verdict.adapter),
        "coverage": verdict.coverage,
        **compared,
        **dict(zip(_EXTRA, extra, strict=True)),
    }


def _effective_rank(adapter: Adapter, spreads: "AdapterSpread") -> float | None:
    """The median over modules of exp of the entropy of the directions' shares; None without measures."""
    import math
    from statistics import median

    found = [
        1.0 if math.isnan(spread.entropy) else math.exp(spread.entropy * math.log(adapter.ranks[name]))
        for name, spread in spreads.items()
        if name in adapter.ranks and spread.norm > 0
    ]
    return median(found) if found else None


def _finding(row: Mapping[str, Any]) -> str | None:
    """The most unusual value, and the adapter that this one nearly equals."""
    from lora_cli.checks.unusual import Unusual

    said = []
    if row["copy_of"] is not None:
        said.append(f"cosine {row['copy_cosine']:.4f} with {row['copy_of']}")
    if row["z"] is not None:
        keys = {"low": "usual_low", "high": "usual_high"}
        said.append(Unusual(**{name: row[keys.get(name, name)] for name in Unusual.__slots__}).in_words())
    return "; ".join(said) or None


def _copies(judged: Sequence["Judged"]) -> list[str]:
    """One line about near copies and exact ones, if there are any."""
    from lora_cli.steps.pool.sketched import NEAR

    near = [one for one in judged if one.copy is not None]
    if not near:
        return []
    same = sum(one.copy is not None and one.copy.same for one in near)
    first = near[0]
    named = f"{first.verdict.adapter.id} and {first.copy.id}" if first.copy else ""
    return [
        f"near copies (cosine {NEAR:g} and above, estimated from sketches): {len(near):,} of {len(judged):,}, "
        f"{same:,} of them the same weights, such as {named}; lora select --dedupe {NEAR:g} takes one of each"
    ]


def _not_compared(catalogue: "Catalogue", judged: Sequence["Judged"]) -> list[str]:
    """One line per base whose pool is too small, with the command that measures the others if there are others."""
    from lora_cli.checks.unusual import FEWEST

    lines = []
    for base, pool in {one.verdict.adapter.base: one.pool for one in judged if 0 < one.pool < FEWEST}.items():
        usable = sum(row.base == base for row in catalogue.find(status="ok"))
        how = (
            "lora pool list --where status=ok -q | lora pool verify - --deep measures all"
            if usable > pool
            else "the catalogue has no other usable ones"
        )
        lines.append(
            f"too few adapters of {base or 'no declared base'} to compare: {pool} measured, {FEWEST} needed; {how}"
        )
    return lines


def _sum_up(screen: Screen, rows: Sequence[Mapping[str, Any]], deep: bool) -> None:
    """The summary. Refused, with the first reason, if an adapter is refused or in quarantine."""
    bad = [row for row in rows if row["status"] != "ok"]
    if bad:
        held = sum(row["status"] == "quarantined" for row in bad)
        said = [f"{len(bad) - held:,} of {len(rows):,} refused"] if len(bad) > held else []
        said += [f"{held:,} of {len(rows):,} quarantined"] if held else []
        raise Refused(f"{', '.join(said)}: {bad[0]['id']}: {bad[0]['reason']}")
    screen.say(f"{len(rows):,} ok" + ("" if deep else " (weights not read: --deep)"))


def _share(share: float | None) -> str | None:
    return None if share is None else percent(share)


def _adapter_or_folder(catalogue: "Catalogue", text: str, progress: Progress) -> Adapter:
    """The row of an id or a folder; for a folder that is not in the catalogue, a row with its place only."""
    from lora_cli.formats.store import folder_ref
    from lora_cli.imports import file_of
    from lora_cli.steps.pool.lookup import pinned

    folder = folder_of(text) or file_of(text)
    looks_like_path = text.startswith((".", "/", "~"))
    if looks_like_path and folder is None:
        like = folders_like(text)
        raise NothingMatched(f"{text}: no such folder", hint=meant(like))
    if folder is None or (not looks_like_path and catalogue.known([text])):
        return pinned(catalogue, text, progress)
    ref = folder_ref(folder)
    row: Adapter | None = catalogue.at(folder)
    if row is not None and row.commit == ref.commit:
        return row
    return Adapter(id=text, commit=ref.commit, source="folder", repo=ref.repo)


def register(pool: typer.Typer) -> None:
    """Add `lora pool verify` to the commands of the pool."""
    pool.command(
        cls=Command,
        epilog=examples(
            "lora pool verify $(lora pool list --where status=ok -q -n 2)",
            "lora pool verify --deep",
            "lora pool list --where 'rank<=16' -q | lora pool verify - --deep",
            "lora pool verify $(lora pool list --where status=ok -q -n 2) --deep --quarantine-z 10",
        ),
    )(with_flags(verify))
