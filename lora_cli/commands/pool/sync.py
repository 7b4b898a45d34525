"""`lora pool sync`: bring the catalogue up to date."""

import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_cli.columns import Column
from lora_cli.commands.options import Command, Listing, Stored, examples, with_flags
from lora_cli.commands.pool.shared import Alias, DryRun
from lora_cli.errors import NothingMatched, Partial, UsageError
from lora_cli.formats.base_names import split_revision
from lora_cli.names import is_model
from lora_cli.options import Flag, Options
from lora_cli.screen import Screen
from lora_cli.settings import Settings, folder_of, folders_like
from lora_cli.text import counted, duration, meant, size

if TYPE_CHECKING:
    from lora_cli.steps.pool.sync import SyncOptions, SyncReport

_REQUESTS, _BYTES = 4, 8_000
"""What reading one adapter takes at most, with a header of usual length."""
_REQUESTS_A_SECOND = 40
"""What the Hub's limits allow with a PRO login: 12,000 requests for files in 5 minutes."""
_MANY, _NAMED = 100, 5
_HEADINGS = {"weeks": "made in the week", "reasons": "cannot be used", "authors": "authors"}
_PLANNED = (Column("ACTION", "action"), Column("ADAPTER", "id"))


class Wanted(Options, frozen=True, kw_only=True):
    """Which adapters a sync looks at."""

    no_alias: Annotated[tuple[str, ...], Flag(help="A name that is no longer an alias; repeatable.")] = ()
    no_copies: Annotated[
        bool, Flag(help="Leave out adapters of quantised copies and mirrors of the base. Hub only.")
    ] = False
    author: Annotated[tuple[str, ...], Flag(help="Only adapters of this user; repeatable. Hub only.")] = ()
    since: Annotated[
        str, Flag(help="Only adapters created since: 30d, 8w or a date. Hub only.", default="any time")
    ] = ""
    max_size: Annotated[str, Flag(help="Refuse larger weights, such as 500MB. Hub only.", default="any size")] = ""
    limit: Annotated[int | None, Flag(help="The most adapters to look at.", minimum=1)] = None
    budget_requests: Annotated[int | None, Flag(help="The most requests to send; a rerun continues.", minimum=1)] = None

    def options(self, aliases: Sequence[str], *, force: bool, dry_run: bool) -> "SyncOptions":
        """The options of the step. UsageError for a time or a size that is none."""
        from lora_cli.steps.pool.sync import SyncOptions

        return SyncOptions(
            aliases=aliases,
            dropped=self.no_alias,
            limit=self.limit,
            since=_moment(self.since) if self.since else "",
            authors=self.author,
            max_bytes=_bytes(self.max_size) if self.max_size else None,
            copies=not self.no_copies,
            force=force,
            dry_run=dry_run,
        )


def sync(
    base: Annotated[
        str | None,
        typer.Argument(help="Base model: Hub id, with @revision if any, or folder.", show_default="the setting"),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="Folder tree of adapters, or a text file of Hub ids.",
            show_default="setting pool, or the Hub",
        ),
    ] = None,
    alias: Alias = None,
    force: Annotated[bool, typer.Option("--force", help="Read unchanged adapters again.")] = False,
    dry_run: DryRun = False,
    *,
    wanted: Wanted,
    setup: Stored,
    listing: Annotated[Listing, _PLANNED],
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
    options = wanted.options(aliases, force=force, dry_run=dry_run)
    if settings.pool is None:
        _refuse_without_hub_id(settings)
    screen.say(_assumed(settings))
    name, place = ("hub", "") if settings.pool is None else ("folder", str(settings.pool))
    if folder is not None and settings.pool is not None and os.path.isfile(settings.pool):  # noqa: PTH113 - a long name
        name = "ids"
    with Catalogue(settings.db) as catalogue, screen.progress() as progress:
        report = step(
            catalogue,
            open_source(name, place, budget=wanted.budget_requests, progress=progress),
            options,
            base=settings.base or "",
            skeleton=look_here(settings.base),
            progress=progress,
        )
    _show(screen, report, dry_run=dry_run)


def _show(screen: Screen, report: "SyncReport", *, dry_run: bool) -> None:
    """Print the outcome. Partial if adapters are left."""
    line = _outcome(report)
    if not report.complete:
        id, reason = report.failures[0] if report.failures else ("", "")
        detail = f" ({id}: {reason})" if id else ""
        raise Partial(line + detail, hint="the adapters read so far are kept; rerun the same command for the rest")
    if dry_run or screen.format != "auto":
        figures = report.figures
        if dry_run:
            figures["expected"] = _expected(report)
        rows = [{"id": id, "action": action} for id, action in report.plan if dry_run or action != "unchanged"]
        screen.rows("lora.pool.sync/1", _PLANNED, rows, extra=figures)
    if dry_run:
        screen.say(f"would do: {line}{_in_words(_expected(report))}")
        return
    screen.say(line)
    if report.to_read >= _MANY:
        for name, counts in report.read.most(_NAMED).items():
            if counts:
                screen.say(f"{_HEADINGS[name]}: " + " · ".join(f"{what} {n:,}" for what, n in counts.items()))
        if report.copies:
            screen.say(f"the same weights as another: {report.copies:,}; select --dedupe 1 takes one of each")
        near = f"{report.near_copies:,} of the {report.sketched:,} with a sketch" if report.sketched else "not measured"
        screen.say(f"nearly equal to another: {near}; lora pool verify --deep sketches fetched weights")


def _expected(report: "SyncReport") -> dict[str, int]:
    """What reading the new and changed adapters of a Hub will take at most."""
    requests = report.to_read * _REQUESTS if report.requests else 0
    return {
        "requests": requests,
        "bytes": requests // _REQUESTS * _BYTES,
        "seconds": round(requests / _REQUESTS_A_SECOND),
    }


def _in_words(expected: dict[str, int]) -> str:
    if not expected["requests"]:
        return ""
    time = duration(expected["seconds"])
    return f"; reading them takes at most {expected['requests']:,} requests, {size(expected['bytes'])}, about {time}"


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
    if not is_model(split_revision(settings.base)[0]):
        hint = meant(folders_like(settings.base), "give a Hub id or an existing folder")
        raise NothingMatched(f"no base model at {settings.base}: no such folder", hint=hint)


def _assumed(settings: Settings) -> str:
    """The sources of base and adapters, in one line."""
    base = f"base {settings.base} ({settings.origin('base')})" if settings.base else "any base"
    if settings.pool is None:
        left_out = settings.origin("pool")
        return f"{base} · from the Hub" + (f" (pool: {left_out})" if left_out != "default" else "")
    return f"{base} · from {settings.pool} ({settings.origin('pool')})"


def _outcome(report: "SyncReport") -> str:
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
        parts += [counted(report.requests, "request"), size(report.bytes)]
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


def _bytes(text: str) -> int:
    """A size in bytes."""
    from lora_cli.catalogue.where import number_in

    number = number_in(text)
    if number is None or number < 0:
        raise UsageError(f"--max-size {text!r}: not a size", hint="a number of bytes, such as 500MB or 1.5G")
    return int(number)


def register(pool: typer.Typer) -> None:
    """Add `lora pool sync` to the commands of the pool."""
    pool.command(
        cls=Command,
        epilog=examples(
            "lora pool sync",
            "lora pool sync --since 30d --max-size 500MB --dry-run",
            "lora pool sync --from pool",
            "lora pool sync --from pool --dry-run --json",
        ),
    )(with_flags(sync))
