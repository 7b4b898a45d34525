"""`lora pool`: the catalogued adapters, and the facts about each."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_cli.commands import completing, similarity
from lora_cli.commands.options import (
    Catalogued,
    Command,
    Document,
    Group,
    Listing,
    Stored,
    Where,
    examples,
    screen_for,
    with_flags,
)
from lora_cli.errors import AccessDenied, NothingMatched, Partial, Refused, UsageError
from lora_cli.records import Adapter, AdapterRow, Progress
from lora_cli.screen import Column, Screen
from lora_cli.settings import Settings, folder_of
from lora_cli.text import duration, size

if TYPE_CHECKING:
    from lora_cli.catalogue.adapters import Catalogue

app = typer.Typer(cls=Group, help="The adapters of the catalogue: find them, list them, fetch and check them.")

_ADAPTERS = (
    Column("ADAPTER", "id", wide=True),
    Column("REV", "rev"),
    Column("RANK", "rank", "right"),
    Column("SCALE", "scale", "right", minor=True),
    Column("MODULES", "targets", minor=True),
    Column("SIZE", "size", "right", minor=True),
    Column("LICENCE", "licence", minor=True),
    Column("BASE", "model", minor=True),
    Column("STATUS", "state", wide=True),
)
_PLANNED = (Column("ACTION", "action"), Column("ADAPTER", "id"))
_FETCHED = (Column("ADAPTER", "id", wide=True), Column("ACTION", "action"), Column("SIZE", "size", "right"))
_VERDICTS = (
    Column("ADAPTER", "id", wide=True),
    Column("STATUS", "status"),
    Column("BASE", "base", minor=True),
    Column("MATCH", "base_match", minor=True),
    Column("COVERAGE", "covered", "right"),
    Column("NORM", "norm", "right"),
    Column("REASON", "reason", wide=True),
)
_SELECTIONS = (
    Column("NUMBER", "id", "right"),
    Column("NAME", "name", wide=True),
    Column("METHOD", "method"),
    Column("ADAPTERS", "adapters", "right"),
    Column("MADE", "created", minor=True),
)
_COUNTS = (Column("COLUMN", "column"), Column("VALUE", "value", wide=True), Column("ADAPTERS", "adapters", "right"))

Rows = Annotated[int | None, typer.Option("-n", help="How many at most.", min=1, max=1_000_000_000, show_default="all")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan as data and change nothing.")]
Alias = Annotated[
    list[str] | None, typer.Option("--alias", help="Another name under which adapters declare this base; repeatable.")
]


@app.command(
    cls=Command,
    epilog=examples("lora pool sync", "lora pool sync --from pool", "lora pool sync --from pool --dry-run --json"),
)
@with_flags
def sync(
    base: Annotated[
        str | None,
        typer.Argument(help="Base model: Hub id, with @revision if any, or folder.", show_default="the setting"),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option("--from", help="Folder tree of adapters to read.", show_default="setting pool, or the Hub"),
    ] = None,
    alias: Alias = None,
    no_alias: Annotated[
        list[str] | None, typer.Option("--no-alias", help="A name that is no longer an alias; repeatable.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="The most adapters to look at.", min=1)] = None,
    since: Annotated[
        str | None, typer.Option("--since", help="Only adapters created since: 30d, 8w or a date. Hub only.")
    ] = None,
    budget: Annotated[
        int | None, typer.Option("--budget-requests", help="The most requests to send; a rerun continues.", min=1)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Read unchanged adapters again.")] = False,
    dry_run: DryRun = False,
    *,
    setup: Stored,
    listing: Listing,
) -> None:
    """Bring the catalogue up to date with the Hub, or with a folder tree of adapters.

    From the Hub, sync reads the listing and, for new or changed adapters, the configuration and the header of the
    weights, never the weights. Unchanged adapters are not read again. Unusable adapters are listed with the reason.
    """
    from lora_cli.catalogue.adapters import Catalogue
    from lora_cli.sources import open_source
    from lora_cli.steps.bases import look_here
    from lora_cli.steps.pool.sync import sync as step

    screen = listing.screen()
    settings = setup.load(base=base, pool=folder)
    aliases = tuple(dict.fromkeys([*settings.base_aliases, *(alias or ())]))
    created = _moment(since) if since else ""
    if settings.pool is None:
        _refuse_without_hub_id(settings)
    screen.say(_assumed(settings))
    name, place = ("hub", "") if settings.pool is None else ("folder", str(settings.pool))
    with Catalogue(settings.db) as catalogue, screen.progress() as progress:
        report = step(
            catalogue,
            open_source(name, place, budget=budget, progress=progress),
            base=settings.base or "",
            aliases=aliases,
            dropped=no_alias or (),
            skeleton=look_here(settings.base),
            limit=limit,
            since=created,
            force=force,
            dry_run=dry_run,
            progress=progress,
        )
    line = _outcome(report)
    if not report.complete:
        id, reason = report.failures[0] if report.failures else ("", "")
        detail = f" ({id}: {reason})" if id else ""
        raise Partial(line + detail, hint="the adapters read so far are kept; rerun the same command for the rest")
    if dry_run or screen.format != "auto":
        figures = {key: value for key, value in asdict(report).items() if key not in ("plan", "failures")}
        rows = [{"id": id, "action": action} for id, action in report.plan if dry_run or action != "unchanged"]
        screen.rows("lora.pool.sync/1", _PLANNED, rows, extra=figures)
    screen.say(f"would do: {line}" if dry_run else line)


@app.command(
    "list",
    cls=Command,
    epilog=examples(
        "lora pool list --where 'rank<=16' --sort -downloads -n 20",
        "lora pool list --where status!=ok",
        "lora pool list --where licence=apache-2.0,mit -q",
    ),
)
@with_flags
def list_(
    where: Where = None,
    sort: Annotated[
        str,
        typer.Option(
            "--sort",
            help="Column to sort by, smallest, oldest or A first; -COLUMN largest first.",
            autocompletion=completing.sorting,
        ),
    ] = "id",
    n: Rows = None,
    *,
    setup: Stored,
    listing: Listing,
) -> None:
    """List adapters, one row each, unusable ones with the reason.

    Conditions are COLUMN OP VALUE with the operators = != < <= > >= ~ (contains) and !~; numbers may end in k, M or G.
    """
    from lora_cli.catalogue.adapters import Catalogue

    screen = listing.screen()
    with Catalogue(setup.load().db) as catalogue:
        found = catalogue.find(where or (), sort=sort, limit=n)
    _show(screen, "lora.pool.list/1", found, "no adapter" + (" fits these conditions" if where else " is known"))


@app.command(cls=Command, epilog=examples("lora pool search rotate", "lora pool search 'kestrel adapter' --json -n 5"))
@with_flags
def search(
    text: Annotated[str, typer.Argument(help="Words, or the beginnings of words.")],
    n: Annotated[int, typer.Option("-n", help="How many at most.", min=1, max=1_000_000_000)] = 50,
    *,
    setup: Stored,
    listing: Listing,
) -> None:
    """Find adapters by words in their id, author, target modules or card, the best match first."""
    from lora_cli.catalogue.adapters import Catalogue

    screen = listing.screen()
    with Catalogue(setup.load().db) as catalogue:
        found = catalogue.search(text, limit=n)
    _show(screen, "lora.pool.search/1", found, f"no adapter matches {text!r}")


@app.command(
    cls=Command,
    epilog=examples(
        "lora pool show $(lora pool list -q -n 1)", "lora pool show $(lora pool list -q -n 1 --sort rank) --json"
    ),
)
@with_flags
def show(
    adapter: Annotated[
        str,
        typer.Argument(help="Id (with @commit for that version only) or folder.", autocompletion=completing.adapters),
    ],
    *,
    setup: Stored,
    form: Document,
) -> None:
    """Show all facts about one adapter, their sources, and the reason if it is unusable."""
    from lora_cli.catalogue.adapters import Catalogue
    from lora_cli.formats.store import locate

    screen = form.screen()
    with Catalogue(setup.load().db) as catalogue:
        row = catalogue.named(adapter)
        provenance = catalogue.provenance(row.id)
    files = locate(row.ref)
    facts = asdict(row) | {"target_modules": list(row.target_modules), "ranks": dict(row.ranks)}
    order = (
        "id",
        "status",
        "reason",
        *(key for key in facts if key not in ("id", "status", "reason", "card", "ranks")),
    )
    weights = str(files.weights) if files else None
    rest = {**provenance, "weights": weights, "ranks": facts["ranks"], "card": facts["card"]}
    screen.document("lora.pool.show/1", {key: facts[key] for key in order} | rest)


@app.command(cls=Command, epilog=examples("lora pool stats", "lora pool stats --json"))
@with_flags
def stats(*, setup: Stored, listing: Listing) -> None:
    """Count the catalogue's adapters by status, base, rank, licence, author, data type and reason."""
    from lora_cli.catalogue.adapters import Catalogue

    screen = listing.screen()
    with Catalogue(setup.load().db) as catalogue:
        figures = catalogue.stats()
    rows = [
        {"column": name.removeprefix("by_"), "value": value, "adapters": count}
        for name, counts in figures.items()
        if isinstance(counts, Mapping)
        for value, count in counts.items()
    ]
    totals = {name: value for name, value in figures.items() if not isinstance(value, Mapping)}
    screen.rows("lora.pool.stats/1", _COUNTS, rows, identity="value", extra=totals)
    screen.say(
        f"{totals['adapters']:,} adapters of {totals['authors']:,} known authors · {totals['usable']:,} usable · "
        f"{size(totals['bytes'])} of weights · last sync {totals['last_sync'] or 'never'}"
    )


@app.command(
    cls=Command,
    epilog=examples(
        "lora pool sql 'select author, count(*) n from adapters group by 1 order by n desc limit 5'",
        "lora pool sql 'select rank, count(*) n from adapters group by rank' --csv",
    ),
)
@with_flags
def sql(
    query: Annotated[str, typer.Argument(help="One SELECT statement.")],
    *,
    setup: Stored,
    listing: Listing,
) -> None:
    """Query the catalogue in SQL. Read-only: it cannot change, attach or load anything, and it stops after 10 s."""
    from lora_cli.catalogue.sql import query as ask

    screen = listing.screen()
    names, rows = ask(setup.load().db, query)
    keys = [name if name not in names[:place] else f"{name}_{place + 1}" for place, name in enumerate(names)]
    shown = [{key: _json_value(value) for key, value in zip(keys, row, strict=True)} for row in rows]
    columns = [Column(key.upper(), key, wide=True, least=12) for key in keys]
    screen.rows("lora.pool.sql/1", columns, shown, identity=keys[0])


@app.command(
    cls=Command,
    epilog=examples(
        "lora pool rm $(lora pool list --where status!=ok -q -n 1)",
        "lora pool list --where 'status!=ok' -q | lora pool rm - --dry-run",
    ),
)
@with_flags
def rm(
    adapter: Annotated[
        list[str],
        typer.Argument(metavar="ADAPTER...", help="Ids, - for stdin.", autocompletion=completing.adapters),
    ],
    dry_run: DryRun = False,
    *,
    setup: Stored,
) -> None:
    """Forget adapters: delete their rows, keep their files. The next sync adds those that it finds again."""
    from lora_cli.catalogue.adapters import Catalogue
    from lora_cli.commands.chosen import expand

    screen = screen_for()
    with Catalogue(setup.load().db) as catalogue:
        ids = list(dict.fromkeys(catalogue.named(text).id for text in expand(adapter)))
        if dry_run:
            screen.text("".join(f"{id}\n" for id in ids))
            return
        catalogue.remove(ids)
    screen.say(f"forgot {len(ids):,} adapter{'s'[: len(ids) != 1]}; their files stay where they are")


@app.command(
    cls=Command,
    epilog=examples("lora pool selections", "lora select -k 2 --name two && lora pool selections --drop two"),
)
@with_flags
def selections(
    drop: Annotated[
        str | None,
        typer.Option(
            "--drop", help="Forget the selections of this name or number.", autocompletion=completing.selections
        ),
    ] = None,
    *,
    setup: Stored,
    listing: Listing,
) -> None:
    """List the selections, the newest first, or drop some."""
    from lora_cli.catalogue.adapters import Catalogue

    screen = listing.screen()
    with Catalogue(setup.load().db) as catalogue:
        if drop is not None:
            count = catalogue.selections.drop(drop)
            if not count:
                raise NothingMatched(f"no selection {drop!r}", hint="see lora pool selections")
            screen.say(f"dropped {count} selection{'s'[: count != 1]}")
            return
        rows = catalogue.selections.all()
    shown = [{**row, "created": row["created"][:19]} for row in rows]
    screen.rows("lora.pool.selections/1", _SELECTIONS, shown)


@app.command(cls=Command, epilog=examples("lora pool path", 'cp "$(lora pool path)" catalogue-backup.db'))
@with_flags
def path(*, setup: Stored) -> None:
    """Print the path of the catalogue's database."""
    screen_for().text(f"{setup.load().db}\n")


@app.command(
    cls=Command,
    epilog=examples(
        "lora pool fetch $(lora pool list --where status=ok -q -n 3)", "lora pool list -q | lora pool fetch - --dry-run"
    ),
)
@with_flags
def fetch(
    adapter: Annotated[
        list[str] | None,
        typer.Argument(
            help="Ids or folders, - for stdin.",
            show_default="the last selection",
            autocompletion=completing.adapters,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Redo the work and replace the output.")] = False,
    dry_run: DryRun = False,
    *,
    setup: Stored,
    listing: Listing,
) -> None:
    """Download the weights of adapters into the Hub client's cache and check them.

    Every byte is checked against the Hub's hash; norm, NaN and zero weights are recorded in the catalogue. Weights that
    are present and checked are skipped.
    """
    from lora_cli.catalogue.adapters import Catalogue
    from lora_cli.commands.chosen import expand
    from lora_cli.hub.client import Hub
    from lora_cli.steps.pool import fetch as step
    from lora_cli.steps.pool.lookup import look_up

    screen = listing.screen()
    settings = setup.load()
    with Catalogue(settings.db) as catalogue, screen.progress() as progress:
        if adapter:
            look = partial(
                look_up,
                catalogue,
                base=settings.base or "",
                aliases=settings.base_aliases,
                announce=screen.say,
                progress=progress,
            )
            refs = [look(text).ref for text in dict.fromkeys(expand(adapter))]
        else:
            last = catalogue.selections.last()
            if last is None:
                raise UsageError(
                    "no adapters given, and nothing was selected yet", hint="lora pool fetch ID…, or lora select"
                )
            refs = list(last.refs)
        todo = step.plan(catalogue, refs, force=force)
        if dry_run:
            rows = [*_acted("here", todo.here), *_acted("fetch", todo.missing)]
            rows += [{**row, "reason": why} for a, why in todo.refused for row in _acted("refuse", [a])]
            screen.rows("lora.pool.fetch/1", _FETCHED, rows)
            screen.say(f"would fetch {len(todo.missing):,} adapters, {size(todo.bytes)}")
            return
        if todo.bytes:
            screen.say(f"fetching {len(todo.missing):,} adapters, {size(todo.bytes)}")
        report = step.fetch(catalogue, todo, Hub(progress=progress), progress=progress)
    _raise_if_not_all(report)
    rows = [*_acted("fetched", report.fetched), *_acted("here", report.here)]
    screen.rows("lora.pool.fetch/1", _FETCHED, rows)
    screen.say(f"{len(report.fetched):,} fetched · {len(report.here):,} up to date · {size(report.bytes)}")


@app.command(
    cls=Command,
    epilog=examples(
        "lora pool verify $(lora pool list --where status=ok -q -n 2)",
        "lora pool list --where status=ok -q | lora pool verify - --deep",
    ),
)
@with_flags
def verify(
    adapter: Annotated[list[str], typer.Argument(help="Ids or folders, - for stdin.")],
    deep: Annotated[bool, typer.Option("--deep", help="Read the weights too: hash, norm, NaN, zero.")] = False,
    alias: Alias = None,
    *,
    setup: Catalogued,
    listing: Listing,
) -> None:
    """Check adapters afresh, ignoring the catalogue, and show the share of modules that fit the base model.

    Folders need not be in the catalogue. Weights of adapters that the catalogue lists as unusable are read without
    --deep too. Every adapter gets a row; exit code 5 if one is refused.
    """
    from lora_cli.catalogue.adapters import Catalogue
    from lora_cli.commands.chosen import expand
    from lora_cli.hub.client import Hub
    from lora_cli.steps.bases import look_here
    from lora_cli.steps.pool.lookup import names_of
    from lora_cli.steps.pool.verify import verify as step

    screen = listing.screen()
    settings = setup.load()
    rows: list[dict[str, Any]] = []
    with Catalogue(settings.db) as catalogue, screen.progress() as progress:
        hub = Hub(progress=progress)
        aliases = names_of(catalogue, settings.base, [*settings.base_aliases, *(alias or ())])
        texts = list(dict.fromkeys(expand(adapter)))
        rows_known = [_adapter_or_folder(catalogue, text, progress) for text in texts]
        for done, row in enumerate(rows_known):
            progress("verifying adapters", done, len(texts))
            asked = settings.base or row.base
            skeleton = look_here(asked)
            verdict = step(
                row,
                hub=hub,
                base=settings.base or "",
                aliases=aliases,
                skeleton=skeleton() if skeleton else None,
                deep=deep,
            )
            covered = None if verdict.coverage is None else f"{verdict.coverage:.0%}"
            rows.append({**_facts(verdict.adapter), "coverage": verdict.coverage, "covered": covered})
    screen.rows("lora.pool.verify/1", _VERDICTS, rows)
    bad = [row for row in rows if row["status"] != "ok"]
    if bad:
        raise Refused(f"{len(bad):,} of {len(rows):,} refused: {bad[0]['id']}: {bad[0]['reason']}")
    screen.say(f"{len(rows):,} ok" + ("" if deep else " (weights not read: --deep)"))


similarity.register(app)


def _refuse_without_hub_id(settings: Settings) -> None:
    if not settings.base:
        raise UsageError(
            "no base model to look for adapters of",
            hint='lora pool sync BASE, or base = "owner/name" in lora.toml, or LORA_BASE=owner/name',
        )
    if folder_of(settings.base) is not None:
        raise UsageError(
            f"the base {settings.base} is a folder, so the Hub has no adapters of it",
            hint="read adapters from a folder tree with --from DIR, or give the base's Hub id",
        )


def _assumed(settings: Settings) -> str:
    """The sources of base and adapters, in one line."""
    base = f"base {settings.base} ({settings.origin('base')})" if settings.base else "any base"
    if settings.pool is None:
        left_out = settings.origin("pool")
        return f"{base} · from the Hub" + (f" (pool: {left_out})" if left_out != "default" else "")
    return f"{base} · from {settings.pool} ({settings.origin('pool')})"


def _adapter_or_folder(catalogue: "Catalogue", text: str, progress: Progress) -> Adapter:
    """The row of an id or a folder; for a folder that is not in the catalogue, a row with its place only."""
    from lora_cli.formats.store import folder_ref
    from lora_cli.steps.pool.lookup import pinned

    folder = folder_of(text)
    looks_like_path = text.startswith((".", "/", "~"))
    if looks_like_path and folder is None:
        raise NothingMatched(f"{text}: no such folder")
    if folder is None or (not looks_like_path and catalogue.known([text])):
        return pinned(catalogue, text, progress)
    ref = folder_ref(folder)
    row: Adapter | None = catalogue.at(folder)
    if row is not None and row.commit == ref.commit:
        return row
    return Adapter(id=text, commit=ref.commit, source="folder", repo=ref.repo)


def _raise_if_not_all(report: Any) -> None:
    done = f"{len(report.fetched) + len(report.here):,} are on this machine"
    if report.failed:
        adapter, reason = report.failed[0]
        raise Partial(
            f"{len(report.failed):,} not fetched, {done} ({adapter.id}: {reason})", hint="rerun to fetch the rest"
        )
    if report.refused:
        adapter, reason = report.refused[0]
        kind = AccessDenied if adapter.status == "gated" else Refused
        raise kind(
            f"{len(report.refused):,} refused, {done} ({adapter.id}: {reason})", hint=f"lora pool show {adapter.id}"
        )


def _acted(action: str, adapters: Any) -> list[dict[str, Any]]:
    return [
        {"id": a.id, "commit": a.commit, "action": action, "bytes": a.bytes, "size": size(a.bytes), "sha256": a.sha256}
        for a in adapters
    ]


def _show(screen: Screen, schema: str, found: Sequence[AdapterRow], nothing: str) -> None:
    if not found:
        raise NothingMatched(nothing, hint="lora pool list shows all, lora pool sync looks for more")
    rows = [_as_row(adapter) if screen.format == "auto" else _facts(adapter) for adapter in found]
    screen.rows(schema, _ADAPTERS, rows)


def _facts(adapter: AdapterRow) -> dict[str, Any]:
    """An adapter for programs: all fields except the long ones, which `show` prints."""
    facts = asdict(adapter) | {"target_modules": list(adapter.target_modules)}
    del facts["stamp"]
    return facts


def _as_row(adapter: AdapterRow) -> dict[str, Any]:
    """An adapter for people."""
    return {
        **_facts(adapter),
        "rev": adapter.commit[:7],
        "targets": _targets(adapter.target_modules),
        "model": _model_name(adapter.base),
        "size": size(adapter.bytes) if adapter.bytes else None,
        "state": ": ".join(filter(None, (adapter.status, adapter.reason or adapter.notes))),
    }


def _model_name(base: str) -> str:
    """A short form of a base: without owner or folder, with its revision."""
    from lora_cli.formats.base_names import at_revision, split_revision

    name, revision = split_revision(base)
    return at_revision(name.replace("\\", "/").rstrip("/").rpartition("/")[2], revision)


def _targets(names: tuple[str, ...]) -> str:
    """A short form of target modules: the seven of a Llama are "all linear"."""
    short = [name.removesuffix("_proj") for name in names]
    return "all linear" if sorted(short) == ["down", "gate", "k", "o", "q", "up", "v"] else ",".join(short)


def _outcome(report: Any) -> str:
    parts = [f"{report.seen:,} seen", f"{report.new:,} new", f"{report.changed:,} changed"]
    parts.append(f"{report.unchanged:,} unchanged")
    for count, what in (
        (report.unusable, "not usable"),
        (report.gone, "gone"),
        (report.failed, "failed (rerun to retry)"),
        (report.left, "left (rerun to go on)"),
    ):
        if count:
            parts.append(f"{count:,} {what}")
    if report.requests:
        parts += [f"{report.requests:,} requests", size(report.bytes)]
    return " · ".join([*parts, duration(report.seconds)])


def _moment(text: str) -> str:
    """A date, or a time ago, as the Hub writes times."""
    ago = re.fullmatch(r"(\d{1,4})([dwmy])", text)
    if ago:
        days = int(ago[1]) * {"d": 1, "w": 7, "m": 30, "y": 365}[ago[2]]
        return (datetime.now(UTC) - timedelta(days=days)).strftime("%Y-%m-%dT%H:%M:%S.000Z")
    try:
        return datetime.fromisoformat(text).strftime("%Y-%m-%dT%H:%M:%S.000Z")
    except ValueError:
        raise UsageError(f"--since {text!r}: neither a time ago (30d, 8w) nor a date (2026-05-01)") from None


def _json_value(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value.hex() if isinstance(value, bytes) else value


def register(root: typer.Typer) -> None:
    """Add `lora pool` to the command tree."""
    root.add_typer(app, name="pool")
