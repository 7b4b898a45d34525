"""`lora pool import`: scores and adapters that people already have."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_cli.commands.options import Command, Document, Stored, examples, with_flags
from lora_cli.commands.pool.shared import DryRun
from lora_cli.screen import Screen, near
from lora_cli.text import counted, shortened

if TYPE_CHECKING:
    from lora_cli.records import ImportCounts
    from lora_cli.steps.pool.importing import Imported

_MOST_SHOWN = 3


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="CSV, JSONL or Parquet.", show_default=False)],
    id_column: Annotated[
        str,
        typer.Option("--id-column", help="Column of the adapters.", show_default="adapter or id, else the first"),
    ] = "",
    metric: Annotated[
        str,
        typer.Option("--metric", help="Metric of scores for which the file names none.", show_default="score"),
    ] = "",
    dry_run: DryRun = False,
    *,
    setup: Stored,
    form: Document,
) -> None:
    """Take scores of adapters, or the adapters of another pool, into the catalogue: all of a file or nothing.

    Scores stand one a row (columns adapter, task, metric, value, n, commit; the first two and value are needed) or
    one a column, named as the task. Empty cells and NaN are no scores. A column whose name comes again is the task
    NAME.1, as in pandas. Adapters come from a JSONL or Parquet file of `lora pool export`; those that the catalogue
    has stay as they are.
    """
    from lora_cli.steps.pool.importing import import_table

    screen = form.screen()
    with screen.progress() as progress:
        found = import_table(
            setup.load().db, file, id_column=id_column, metric=metric, dry_run=dry_run, progress=progress
        )
    if dry_run or screen.format == "json":
        document = {"file": str(file), "dry_run": dry_run, "run": found.run, **asdict(found.counts)}
        rest = {"empty": found.empty, "left": list(found.left), "renamed": [list(one) for one in found.renamed]}
        screen.document("lora.pool.import/1", document | rest)
    _tell(screen, file, found)


def _tell(screen: Screen, file: Path, found: "Imported") -> None:
    """What was taken and what was left."""
    counts = found.counts
    taken = [
        *_parts("adapter", new=counts.adapters_new, here=counts.adapters_same),
        *_parts("score", new=counts.scores_new, changed=counts.scores_changed, here=counts.scores_same),
    ]
    scored = f" · {counted(counts.scored, 'adapter')} on {counted(counts.tasks, 'task')}" if counts.scored else ""
    screen.say(f"{near(file)}: {' · '.join(taken) or 'nothing to take'}{scored}")
    if left := _left(counts, found):
        screen.say(f"left out: {' · '.join(left)}")
    for place, name, task in found.renamed[:_MOST_SHOWN]:
        screen.say(f"column {place}: {shortened(name)!r} comes again and is the task {shortened(task)!r}")
    if more := len(found.renamed[_MOST_SHOWN:]):
        screen.say(f"{counted(more, 'more column')} of names that come again: --json has all")
    if found.run and counts.scores_new + counts.scores_changed:
        screen.say(f"lora runs rm {found.run} takes these scores out again")


def _parts(what: str, *, new: int = 0, changed: int = 0, here: int = 0) -> list[str]:
    parts = {f"new {what}": new, f"changed {what}": changed, what: here}
    return [counted(count, name) + " already here" * (name == what) for name, count in parts.items() if count]


def _left(counts: "ImportCounts", found: "Imported") -> list[str]:
    left = []
    for state, scores, adapters, ids in (
        ("not in the catalogue", counts.scores_unknown, counts.unknown, counts.unknown_ids),
        ("at another commit there", counts.scores_elsewhere, counts.elsewhere, counts.elsewhere_ids),
    ):
        if scores:
            few = ", ".join(map(shortened, ids)) + (", …" if adapters > len(ids) else "")
            left.append(f"{counted(scores, 'score')} of {counted(adapters, 'adapter')} {state} ({few})")
    if counts.adapters_elsewhere:
        left.append(f"{counted(counts.adapters_elsewhere, 'adapter')} that the catalogue has at another commit")
    if found.empty:
        left.append(counted(found.empty, "empty cell"))
    if found.left:
        left.append(f"unused: {shortened(', '.join(found.left))}")
    return left


def register(pool: typer.Typer) -> None:
    """Add `lora pool import` to the commands of the pool."""
    pool.command(
        "import",
        cls=Command,
        epilog=examples(
            "lora pool export -o pool.jsonl && lora pool import pool.jsonl",
            "lora pool list --columns id,rank --csv > ranks.csv && lora pool import ranks.csv --metric size",
        ),
    )(with_flags(import_))
