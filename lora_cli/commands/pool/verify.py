"""`lora pool verify`: check adapters afresh."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_cli.catalogue.where import COLUMNS
from lora_cli.columns import Column, on_request
from lora_cli.commands.options import Catalogued, Command, Listing, examples, with_flags
from lora_cli.commands.pool.shared import Alias, facts
from lora_cli.errors import NothingMatched, Refused, UsageError
from lora_cli.records import Adapter, Progress
from lora_cli.screen import Screen
from lora_cli.settings import folder_of, folders_like
from lora_cli.text import meant, percent

if TYPE_CHECKING:
    from lora_cli.catalogue.adapters import Catalogue
    from lora_cli.steps.pool.unusual import Judged

_START = (
    Column("ADAPTER", "id", wide=True),
    Column("STATUS", "status"),
    Column("BASE", "base", minor=True),
    Column("MATCH", "base_match", minor=True),
    Column("COVERAGE", "coverage", "right", minor=True, show=lambda row: _share(row["coverage"])),
    Column("NORM", "norm", "right", minor=True),
)
_COMPARED = ("z", "statistic", "module", "value", "usual_low", "usual_high", "pool")
_OTHERS = (
    *on_request(*(key for key in COLUMNS if key not in ("id", "status", "base", "base_match", "norm", "reason"))),
    *on_request("ranks", "card"),
)
_VERDICTS = (*_START, Column("REASON", "reason", wide=True), *_OTHERS, *on_request(*_COMPARED))
_DEEP = (
    *_START,
    Column("Z", "z", "right", show=lambda row: None if row["z"] is None else f"{row['z']:.1f}"),
    Column("FINDING", "finding", wide=True, show=lambda row: row["reason"] or _most_unusual(row)),
    *_OTHERS,
    *on_request("reason", *_COMPARED[1:]),
)


def verify(
    adapter: Annotated[list[str], typer.Argument(help="Ids or folders, - for stdin.")],
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
    """
    from lora_cli.catalogue.adapters import Catalogue
    from lora_cli.commands.chosen import expand
    from lora_cli.hub.client import Hub
    from lora_cli.steps.bases import look_here
    from lora_cli.steps.pool.lookup import names_of
    from lora_cli.steps.pool.unusual import judge
    from lora_cli.steps.pool.verify import verify as step

    if quarantine_z is not None and not deep:
        raise UsageError("--quarantine-z needs --deep")
    screen = listing.screen()
    settings = setup.load()
    with Catalogue(settings.db) as catalogue, screen.progress() as progress:
        hub = Hub(progress=progress)
        aliases = names_of(catalogue, settings.base, [*settings.base_aliases, *(alias or ())])
        texts = list(dict.fromkeys(expand(adapter)))
        verdicts = []
        for done, row in enumerate([_adapter_or_folder(catalogue, text, progress) for text in texts]):
            progress("verifying adapters", done, len(texts))
            skeleton = look_here(settings.base or row.base)
            verdicts.append(
                step(
                    row,
                    hub=hub,
                    base=settings.base or "",
                    aliases=aliases,
                    skeleton=skeleton() if skeleton else None,
                    deep=deep,
                )
            )
        judged = judge(catalogue, verdicts, quarantine_z) if deep else None
    if judged is None:
        rows = [{**facts(one.adapter), "coverage": one.coverage} for one in verdicts]
        screen.rows("lora.pool.verify/1", _VERDICTS, rows)
    else:
        rows = [_row(one) for one in sorted(judged, key=lambda one: -abs(one.unusual.z) if one.unusual else 0)]
        screen.rows("lora.pool.verify/1", _DEEP, rows)
        for line in _not_compared(judged):
            screen.say(line)
    _sum_up(screen, rows, deep)


def _row(judged: "Judged") -> dict[str, Any]:
    """A row of --deep: the verdict, and the most unusual value beside the pool."""
    found, verdict = judged.unusual, judged.verdict
    compared = dict.fromkeys(_COMPARED) | {"pool": judged.pool}
    if found is not None:
        compared |= {"z": found.z, "statistic": found.statistic, "module": found.module, "value": found.value}
        compared |= {"usual_low": found.low, "usual_high": found.high}
    return {**facts(verdict.adapter), "coverage": verdict.coverage, **compared}


def _most_unusual(row: Mapping[str, Any]) -> str | None:
    from lora_cli.checks.unusual import Unusual

    if row["z"] is None:
        return None
    keys = {"low": "usual_low", "high": "usual_high"}
    return Unusual(**{name: row[keys.get(name, name)] for name in Unusual.__slots__}).in_words()


def _not_compared(judged: Sequence["Judged"]) -> list[str]:
    """One line per base whose pool is too small."""
    from lora_cli.checks.unusual import FEWEST

    small = {one.verdict.adapter.base: one.pool for one in judged if 0 < one.pool < FEWEST}
    return [
        f"too few adapters of {base or 'no declared base'} to compare: {pool} measured, {FEWEST} needed; "
        "lora pool list --where status=ok -q | lora pool verify - --deep measures all"
        for base, pool in small.items()
    ]


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
    from lora_cli.steps.pool.lookup import pinned

    folder = folder_of(text)
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
            "lora pool list --where status=ok -q | lora pool verify - --deep",
            "lora pool verify $(lora pool list --where status=ok -q -n 2) --deep --quarantine-z 10",
        ),
    )(with_flags(verify))
