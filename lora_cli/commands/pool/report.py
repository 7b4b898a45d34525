"""`lora pool report`: the catalogue as one HTML page."""

from pathlib import Path
from typing import Annotated

import typer

from lora_cli.commands.options import Catalogued, Command, Document, Where, examples, with_flags
from lora_cli.screen import near
from lora_cli.text import counted, size


def report(
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help="The page, replaced if it is there.")],
    where: Where = None,
    *,
    setup: Catalogued,
    form: Document,
) -> None:
    """Write the catalogue as one HTML page: counts with bars, and a table that sorts and filters.

    The page asks for no other file, font or host, and shows its counts and first rows without scripts too. The same
    catalogue gives the same bytes.
    """
    from lora_cli.catalogue.adapters import Catalogue
    from lora_cli.outputs import demand_own, whole_file
    from lora_cli.reports.page import BEGINNING
    from lora_cli.reports.pool import pool_page
    from lora_cli.steps.pool.report import pool_report

    screen, settings = form.screen(), setup.load()
    demand_own(out, (BEGINNING,), "page")
    with Catalogue(settings.db) as catalogue:
        found = pool_report(catalogue, where or (), base=settings.base)
    page = pool_page(found)
    with whole_file(out) as file:
        file.write(page)
    total = found.total
    if screen.format == "json":
        shown = {"out": str(out), "bytes": len(page), "adapters": total.adapters, "usable": total.usable}
        screen.document("lora.pool.report/1", shown)
    else:
        screen.text(f"{near(out)}\n")
    screen.say(f"{counted(total.adapters, 'adapter')} · {total.usable:,} usable · page of {size(len(page))}")


def register(pool: typer.Typer) -> None:
    """Add `lora pool report` to the commands of the pool."""
    pool.command(
        cls=Command,
        epilog=examples("lora pool report -o pool.html", "lora pool report --where 'status!=ok' -o refused.html"),
    )(with_flags(report))
