"""`lora runs`: the recorded runs, their inputs and their outcomes."""

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_cli.columns import Column, chosen, on_request
from lora_cli.commands import completing
from lora_cli.commands.options import Command, Document, Group, Listing, Stored, examples, screen_for, with_flags
from lora_cli.errors import UsageError
from lora_cli.options import Flag
from lora_cli.records import Prompt
from lora_cli.screen import Screen, near
from lora_cli.text import counted

if TYPE_CHECKING:
    from lora_cli.steps.evaluate.answers import Change

app = typer.Typer(cls=Group, help="The recorded runs of all commands, with their inputs and outcomes.")

_COLUMNS = (
    Column("RUN", "id"),
    Column("COMMAND", "command", minor=True),
    Column("STATUS", "status"),
    Column("STARTED", "started", minor=True),
    Column("OUTPUT", "out", wide=True),
    *on_request("ended", "error"),
)
_ANSWERS = (
    Column("EXAMPLE", "id"),
    Column("SYSTEM", "system", wide=True, least=12),
    Column("PROMPT", "prompt", wide=True, least=16, show=lambda row: _end(row["prompt"])),
    Column("EXPECTED", "expected", wide=True, least=10),
    Column("GIVEN", "given", wide=True, least=10),
    *on_request("correct", "log_likelihood", "tokens"),
)
_CHANGES = (
    Column("EXAMPLE", "id"),
    Column("CHANGE", "change"),
    Column("PROMPT", "prompt", wide=True, least=16, show=lambda row: _end(row["prompt"])),
    Column("EXPECTED", "expected", wide=True, least=10),
    Column("BEFORE", "before", wide=True, least=10),
    Column("AFTER", "after", wide=True, least=10),
    *on_request("before_correct", "after_correct", "before_log_likelihood", "after_log_likelihood"),
)
_EITHER = (*_ANSWERS, *(one for one in _CHANGES if one.key not in {known.key for known in _ANSWERS}))
_LONGEST_PROMPT = 200


class OnData(Stored, frozen=True, kw_only=True):
    """`Stored`, and the data of an evaluation."""

    test: Annotated[
        Path | None, Flag(help="The test data.", name="data", default="the setting test or data, or the recorded name")
    ] = None


@app.command("list", cls=Command, epilog=examples("lora runs list -n 5", "lora runs list --command fit --json"))
@with_flags
def list_(
    command: Annotated[str | None, typer.Option("--command", help="Only runs of this command.")] = None,
    n: Annotated[int, typer.Option("-n", help="How many at most.", min=1, max=1_000_000_000)] = 50,
    *,
    setup: Stored,
    listing: Annotated[Listing, _COLUMNS],
) -> None:
    """List the latest runs, newest first."""
    from lora_cli.catalogue import runs

    rows = [
        {key: row[key] for key in ("id", "command", "status", "started", "ended", "out", "error")}
        for row in runs.all_runs(setup.load().db, command=command, limit=n)
    ]
    for row in rows:
        row["started"] = row["started"][:19]
        if row["out"]:
            row["out"] = near(Path(row["out"]))
    listing.screen().rows("lora.runs.list/1", _COLUMNS, rows)


@app.command(
    cls=Command,
    epilog=examples(
        "lora runs show $(lora runs list -q -n 1)", "lora runs show $(lora runs list --command merge -q -n 1) --json"
    ),
)
@with_flags
def show(
    run: Annotated[str, typer.Argument(help="The run's id, or the start of it.", autocompletion=completing.runs)],
    *,
    setup: Stored,
    form: Document,
) -> None:
    """Show one run: settings, inputs, versions, outputs and scores."""
    from lora_cli.catalogue import runs

    form.screen().document("lora.runs.show/1", runs.find(setup.load().db, run))


@app.command(
    cls=Command,
    epilog=examples(
        "lora runs answers",
        "lora runs answers --all -n 5 --json",
        "lora runs answers --diff base pool/tarn/mirror",
    ),
)
@with_flags
def answers(
    run: Annotated[
        str | None,
        typer.Argument(
            help="The evaluation's id, or the start of it.",
            show_default="the last with answers",
            autocompletion=completing.runs,
        ),
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="Only answers of this system.")] = None,
    diff: Annotated[
        tuple[str, str] | None,
        typer.Option(
            "--diff", help="What changes from the answers of one system to another's.", metavar="BEFORE AFTER"
        ),
    ] = None,
    wrong: Annotated[
        bool | None,
        typer.Option(
            "--wrong/--all",
            help="Only wrong answers, with --diff only those that are wrong after it; or all.",
            show_default="wrong ones, with --diff those that differ",
        ),
    ] = None,
    n: Annotated[int, typer.Option("-n", help="How many at most.", min=1, max=1_000_000_000)] = 20,
    *,
    setup: OnData,
    listing: Annotated[Listing, _EITHER],
) -> None:
    """Show the wrong answers of an evaluation by exact match or choice: prompts, expected and given answers.

    With --diff, the examples that two systems answer differently: broken (right before, wrong after), fixed, or
    different (right both times, or wrong both times). The prompts come from the test data, which must be what it was.
    A table holds the end of a long prompt, other forms the whole.
    """
    from lora_cli.catalogue import runs
    from lora_cli.steps.evaluate.answers import answers_of, changes, demand_answers_of, last_run

    if diff is not None and system is not None:
        raise UsageError("--diff names its systems: leave out --system")
    screen, settings = listing.screen(), setup.load()
    chosen(_ANSWERS if diff is None else _CHANGES, screen.columns)
    found = answers_of(runs.find(settings.db, run or last_run(settings.db)), [settings.test, settings.data])
    if diff is not None:
        _show_changes(screen, changes(found, *diff), wrong, n)
        return
    if system is not None:
        demand_answers_of(found, system)
    asked = [one for one in found if system in (None, one.system)]
    mistakes = [one for one in asked if not one.correct]
    shown = (asked if wrong is False else mistakes)[:n]
    screen.rows("lora.runs.answers/1", _ANSWERS, [asdict(one) for one in shown])
    screen.say(f"{len(mistakes):,} of {counted(len(asked), 'answer')} wrong · {len(shown):,} shown")


def _show_changes(screen: Screen, found: "list[Change]", wrong: bool | None, n: int) -> None:
    """What changes between two systems: the answers that differ; those wrong afterwards, or all, if asked for."""
    kept = [one for one in found if (one.change != "same" if wrong is None else not (wrong and one.after_correct))]
    count = Counter(one.change for one in found)
    screen.rows("lora.runs.answers.diff/1", _CHANGES, [asdict(one) for one in kept[:n]], extra={"counts": dict(count)})
    parts = [f"{count[change]:,} {change}" for change in ("broken", "fixed", "different", "same")]
    screen.say(f"{', '.join(parts)} of {counted(len(found), 'example')} · {len(kept[:n]):,} shown")


def _end(prompt: Prompt) -> str:
    """The end of a prompt, its last turn if it is a chat."""
    text = prompt if isinstance(prompt, str) else str(prompt[-1].get("content") or "")
    return text if len(text) <= _LONGEST_PROMPT else f"…{text[-_LONGEST_PROMPT:]}"


@app.command(
    cls=Command,
    epilog=examples("lora runs rm $(lora runs list -q -n 1)", "lora runs list --command eval -q | xargs lora runs rm"),
)
@with_flags
def rm(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Ids, or the starts of them.", autocompletion=completing.runs)
    ],
    *,
    setup: Stored,
) -> None:
    """Forget runs and their scores. Their output files stay."""
    from lora_cli.catalogue.runs import find, remove

    file = setup.load().db
    ids = list(dict.fromkeys(str(find(file, run)["id"]) for run in runs))
    remove(file, ids)
    screen_for().say(f"forgot {counted(len(ids), 'run')}")


def register(root: typer.Typer) -> None:
    """Add `lora runs` to the command tree."""
    root.add_typer(app, name="runs")
