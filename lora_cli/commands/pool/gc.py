"""`lora pool gc`: what the caches hold, and what of it can go."""

from datetime import UTC, datetime
from typing import Annotated

import typer

from lora_cli.columns import Column, on_request
from lora_cli.commands.options import Command, Listing, Stored, examples, with_flags
from lora_cli.commands.pool.shared import DryRun, size_of
from lora_cli.errors import UsageError
from lora_cli.text import counted, size

_HELD = (
    Column("REPOSITORY", "id", wide=True),
    Column("REV", "rev", of="commit", show=lambda row: row["commit"][:7] or None),
    Column("SIZE", "bytes", "right", show=size_of),
    Column("USED", "used", minor=True),
    Column("CAN GO", "reason"),
    *on_request("commit"),
)


def gc(
    unused: Annotated[
        int | None, typer.Option("--unused", help="Also what nobody read for so many days.", metavar="DAYS", min=0)
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Delete what can go.")] = False,
    dry_run: DryRun = False,
    *,
    setup: Stored,
    listing: Annotated[Listing, _HELD],
) -> None:
    """Show what the caches hold of the catalogue's adapters and what can go; with --yes delete that.

    Can go: revisions of adapters that are gone, unusable, gated or quarantined; older revisions; downloads that stopped
    over an hour ago; conversions of adapters that the catalogue does not know. What a selection or a recorded run names
    stays, so that merges can be rebuilt. Repositories that the catalogue does not know are never touched.
    """
    if yes and dry_run:
        raise UsageError("--yes and --dry-run exclude each other")
    from lora_cli.catalogue.adapters import Catalogue
    from lora_cli.steps.pool.gc import clear, survey

    screen, settings = listing.screen(), setup.load()
    with Catalogue(settings.db) as catalogue:
        found = survey(catalogue, settings.db, unused=unused)
    rows = [
        {
            "id": held.repo,
            "commit": held.commit,
            "bytes": held.bytes,
            "used": datetime.fromtimestamp(held.used, UTC).date().isoformat(),
            "reason": held.reason,
        }
        for held in found
    ]
    going = [held for held in found if held.reason]
    screen.rows("lora.pool.gc/1", _HELD, rows)
    total = f"{counted(len(found), 'part')} held, {size(sum(held.bytes for held in found))}"
    can_go = size(sum(held.bytes for held in going))
    if not yes:
        again = "; --yes deletes it" if going else ""
        screen.say(f"{total} · {len(going):,} can go, {can_go}{again}")
        return
    screen.say(f"{total} · {len(going):,} deleted, {size(clear(going))} freed")


def register(pool: typer.Typer) -> None:
    """Add `lora pool gc` to the commands of the pool."""
    pool.command(cls=Command, epilog=examples("lora pool gc", "lora pool gc --unused 90 --json", "lora pool gc --yes"))(
        with_flags(gc)
    )
