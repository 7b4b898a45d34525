"""`lora pool search`: adapters by words."""

from typing import Annotated

import typer

from lora_cli.commands.options import Catalogued, Command, Listing, examples, with_flags
from lora_cli.commands.pool.shared import ADAPTERS, no_adapters, show_adapters


def search(
    words: Annotated[list[str], typer.Argument(help="Words, or the beginnings of words: an adapter has all of them.")],
    n: Annotated[int, typer.Option("-n", help="How many at most.", min=1, max=1_000_000_000)] = 50,
    *,
    setup: Catalogued,
    listing: Annotated[Listing, ADAPTERS],
) -> None:
    """Find adapters by words in their id, author, target modules or card, the best match first."""
    from lora_cli.catalogue.adapters import Catalogue

    screen, settings = listing.screen(), setup.load()
    with Catalogue(settings.db) as catalogue:
        text = " ".join(words)
        found = catalogue.search(text, base=settings.base, limit=n)
        if not found:
            raise no_adapters(catalogue, settings.base, f"no adapter matches {text!r}")
    show_adapters(screen, "lora.pool.search/1", found)


def register(pool: typer.Typer) -> None:
    """Add `lora pool search` to the commands of the pool."""
    pool.command(
        cls=Command, epilog=examples("lora pool search rotate", "lora pool search kestrel adapter --json -n 5")
    )(with_flags(search))
