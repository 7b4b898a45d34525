"""`lora pool stats`: counts over the whole catalogue."""

from collections.abc import Mapping
from typing import Annotated

import typer

from lora_cli.columns import Column
from lora_cli.commands.options import Catalogued, Command, Listing, examples, with_flags
from lora_cli.text import counted, size

_COUNTS = (Column("COLUMN", "column"), Column("VALUE", "value", wide=True), Column("ADAPTERS", "adapters", "right"))


def stats(*, setup: Catalogued, listing: Annotated[Listing, _COUNTS]) -> None:
    """Count the catalogue's adapters by status, base, rank, licence, author, data type and reason.

    With --base or the setting, those that were judged for this base are counted.
    """
    from lora_cli.catalogue.adapters import Catalogue

    screen, settings = listing.screen(), setup.load()
    with Catalogue(settings.db) as catalogue:
        figures = catalogue.stats(base=settings.base)
    rows = [
        {"column": name.removeprefix("by_"), "value": value, "adapters": count}
        for name, counts in figures.items()
        if isinstance(counts, Mapping)
        for value, count in counts.items()
    ]
    totals = {name: value for name, value in figures.items() if not isinstance(value, Mapping)}
    screen.rows("lora.pool.stats/1", _COUNTS, rows, identity="value", extra=totals)
    screen.say(
        f"{counted(totals['adapters'], 'adapter')} of {counted(totals['authors'], 'known author')} · "
        f"{totals['usable']:,} usable · "
        f"{size(totals['bytes'])} of weights · last sync {totals['last_sync'] or 'never'}"
    )


def register(pool: typer.Typer) -> None:
    """Add `lora pool stats` to the commands of the pool."""
    pool.command(cls=Command, epilog=examples("lora pool stats", "lora pool stats --json"))(with_flags(stats))
