"""`lora pool fetch`: weights onto this machine."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_cli.columns import Column, on_request
from lora_cli.commands import completing
from lora_cli.commands.options import Command, Listing, Stored, examples, with_flags
from lora_cli.commands.pool.shared import DryRun, size_of
from lora_cli.errors import AccessDenied, Partial, Refused, UsageError
from lora_cli.text import counted, size

if TYPE_CHECKING:
    from lora_cli.records import Adapter
    from lora_cli.steps.pool.fetch import FetchReport

_FETCHED = (
    Column("ADAPTER", "id", wide=True),
    Column("ACTION", "action"),
    Column("SIZE", "bytes", "right", show=size_of),
    *on_request("commit", "sha256", "reason"),
)


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
    listing: Annotated[Listing, _FETCHED],
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
            screen.say(f"would fetch {counted(len(todo.missing), 'adapter')}, {size(todo.bytes)}")
            return
        if todo.bytes:
            screen.say(f"fetching {counted(len(todo.missing), 'adapter')}, {size(todo.bytes)}")
        report = step.fetch(catalogue, todo, Hub(progress=progress), progress=progress)
    _raise_if_not_all(report)
    rows = [*_acted("fetched", report.fetched), *_acted("here", report.here)]
    screen.rows("lora.pool.fetch/1", _FETCHED, rows)
    screen.say(f"{len(report.fetched):,} fetched · {len(report.here):,} up to date · {size(report.bytes)}")


def _raise_if_not_all(report: "FetchReport") -> None:
    done = f"{len(report.fetched) + len(report.here):,} on this machine"
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


def _acted(action: str, adapters: "Sequence[Adapter]") -> list[dict[str, Any]]:
    return [{"id": a.id, "commit": a.commit, "action": action, "bytes": a.bytes, "sha256": a.sha256} for a in adapters]


def register(pool: typer.Typer) -> None:
    """Add `lora pool fetch` to the commands of the pool."""
    pool.command(
        cls=Command,
        epilog=examples(
            "lora pool fetch $(lora pool list --where status=ok -q -n 3)",
            "lora pool list -q | lora pool fetch - --dry-run",
        ),
    )(with_flags(fetch))
