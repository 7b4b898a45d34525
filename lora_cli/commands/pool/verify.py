"""`lora pool verify`: check adapters afresh."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_cli.catalogue.where import COLUMNS
from lora_cli.columns import Column, on_request
from lora_cli.commands.options import Catalogued, Command, Listing, examples, with_flags
from lora_cli.commands.pool.shared import Alias, facts
from lora_cli.errors import NothingMatched, Refused
from lora_cli.records import Adapter, Progress
from lora_cli.settings import folder_of, folders_like
from lora_cli.text import meant, percent

if TYPE_CHECKING:
    from lora_cli.catalogue.adapters import Catalogue

_VERDICTS = (
    Column("ADAPTER", "id", wide=True),
    Column("STATUS", "status"),
    Column("BASE", "base", minor=True),
    Column("MATCH", "base_match", minor=True),
    Column("COVERAGE", "coverage", "right", show=lambda row: _share(row["coverage"])),
    Column("NORM", "norm", "right"),
    Column("REASON", "reason", wide=True),
    *on_request(*(key for key in COLUMNS if key not in ("id", "status", "base", "base_match", "norm", "reason"))),
    *on_request("ranks", "card"),
)


def verify(
    adapter: Annotated[list[str], typer.Argument(help="Ids or folders, - for stdin.")],
    deep: Annotated[bool, typer.Option("--deep", help="Read the weights too: hash, norm, NaN, zero.")] = False,
    alias: Alias = None,
    *,
    setup: Catalogued,
    listing: Annotated[Listing, _VERDICTS],
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
            rows.append({**facts(verdict.adapter), "coverage": verdict.coverage})
    screen.rows("lora.pool.verify/1", _VERDICTS, rows)
    bad = [row for row in rows if row["status"] != "ok"]
    if bad:
        raise Refused(f"{len(bad):,} of {len(rows):,} refused: {bad[0]['id']}: {bad[0]['reason']}")
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
        ),
    )(with_flags(verify))
