"""`lora pool sql`: the user's own query."""

import math
from collections.abc import Sequence
from itertools import count
from typing import Annotated

import typer

from lora_cli.columns import Column
from lora_cli.commands.options import Command, Listing, Stored, examples, with_flags


def sql(
    query: Annotated[str, typer.Argument(help="One SELECT statement.")],
    *,
    setup: Stored,
    listing: Listing,
) -> None:
    """Query the catalogue in SQL. Read-only: it cannot change, attach or load anything; it stops after 10 s.

    Memory, rows and the file for sorting are bounded as well: 1 GB, a million rows or 100 MB of them, 1 GB.
    """
    from lora_cli.catalogue.sql import query as ask

    screen = listing.screen()
    names, rows = ask(setup.load().db, query)
    keys = _unique(names)
    shown = [{key: _json_value(value) for key, value in zip(keys, row, strict=True)} for row in rows]
    columns = [Column(key.upper(), key, wide=True, least=12) for key in keys]
    screen.rows("lora.pool.sql/1", columns, shown, identity=keys[0])


def _unique(names: Sequence[str]) -> list[str]:
    """The names of columns, with a number where one comes again."""
    keys: list[str] = []
    for place, name in enumerate(names, start=1):
        numbered = (f"{name}_{number}" for number in count(place))
        free = (key for key in numbered if key not in keys and key not in names)
        keys.append(next(free) if name in keys else name)
    return keys


def _json_value(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value.hex() if isinstance(value, bytes) else value


def register(pool: typer.Typer) -> None:
    """Add `lora pool sql` to the commands of the pool."""
    pool.command(
        cls=Command,
        epilog=examples(
            "lora pool sql 'select author, count(*) n from adapters group by 1 order by n desc limit 5'",
            "lora pool sql 'select rank, count(*) n from adapters group by rank' --csv",
        ),
    )(with_flags(sql))
