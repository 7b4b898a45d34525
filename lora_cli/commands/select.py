"""`lora select`: choose adapters from the catalogue."""

from typing import TYPE_CHECKING, Annotated

import typer

from lora_cli.columns import Column, on_request
from lora_cli.commands.options import Command, Listing, Loaded, Prompts, examples, with_flags
from lora_cli.recipes import SelectOptions, TrialOptions
from lora_cli.screen import Screen
from lora_cli.text import counted, score

if TYPE_CHECKING:
    from lora_cli.steps.pool.explain import Explanation

_COLUMNS = (
    Column("ADAPTER", "id", wide=True),
    Column("REV", "rev"),
    Column("RANK", "rank", "right"),
    Column("DOWNLOADS", "downloads", "right", minor=True),
    Column("SCORE", "score", "right"),
    *on_request("commit"),
)


def select(
    name: Annotated[str, typer.Option("--name", help="A name to find this selection by later.")] = "",
    explain: Annotated[
        bool, typer.Option("--explain", help="Say on stderr, and in --json, why adapters were taken or not.")
    ] = False,
    *,
    options: SelectOptions,
    judging: TrialOptions,
    setup: Loaded,
    listing: Annotated[Listing, _COLUMNS],
    prompts: Prompts,
) -> None:
    """Choose usable adapters of one base model and remember the choice.

    The ids go to stdout; merge and fit take the last selection if no adapters are named. random is the control: a
    useful selection method has to beat it. evaluation takes the scores of a task: stored and imported ones count, and
    only missing ones are measured, on one load of the base; race measures about a quarter of that.
    """
    from lora_cli.catalogue.adapters import Catalogue
    from lora_cli.steps.select.request import SelectRequest

    found: list[Explanation] = []
    screen, settings, prompting = listing.screen(), setup.load(), prompts.prompting()
    with screen.progress() as progress, Catalogue(settings.db) as catalogue:
        request = SelectRequest(
            catalogue, settings, options, judging, prompting, announce=screen.say, progress=progress
        )
        chosen, asked = request.run(name=name, explained=found.append if explain else None)
    rows = [
        {
            "id": adapter.id,
            "commit": adapter.commit,
            "rev": adapter.commit[:7],
            "rank": adapter.rank,
            "downloads": adapter.downloads,
            "score": score,
        }
        for adapter, score in chosen
    ]
    reasons = {"explained": found[0].rows, "outside": found[0].outside} if found else {}
    screen.rows("lora.select/1", _COLUMNS, rows, extra={"by": options.by, **asked, **reasons})
    for explanation in found:
        _tell(screen, explanation)
    few = f", {options.k - len(chosen)} fewer than asked for" if len(chosen) < options.k else ""
    named = f", remembered as {name!r}" if name else ""
    screen.say(f"select {options.by}: {counted(len(chosen), 'adapter')}{few}{named}")


def _tell(screen: Screen, explanation: "Explanation") -> None:
    """The rows of an explanation as lines with aligned columns, and the counts of adapters outside the choice."""
    wide = max(len(row["id"]) for row in explanation.rows)
    for row in explanation.rows:
        place = "-" if row["place"] is None else f"{row['place']:,}"
        value = "-" if row["score"] is None else score(row["score"])
        mark = "taken" if row["taken"] else "not taken"
        screen.say(f"{place:>7}  {row['id']:<{wide}}  {value:>13}  {mark:<9}  {row['why']}")
    if explanation.outside:
        screen.say("no candidate: " + ", ".join(f"{count:,} {why}" for why, count in explanation.outside.items()))


def register(root: typer.Typer) -> None:
    """Add `lora select` to the command tree."""
    root.command(
        cls=Command,
        epilog=examples(
            "lora select --by random -k 8 --seed 1",
            "lora select --by rank -k 5 --where 'licence=apache-2.0' --max-per-author 2 -q",
            "lora select --by recent -k 5 --explain",
            "lora select --by evaluation --data task.jsonl --metric nll -k 3",
        ),
    )(with_flags(select))
