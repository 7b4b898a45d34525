"""`lora task`: look at a task as a base reads it."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_cli.commands.options import Command, Document, Group, Prompts, Seeded, examples, with_flags
from lora_cli.errors import UsageError
from lora_cli.screen import Screen, near
from lora_cli.task import load_task
from lora_cli.text import counted

if TYPE_CHECKING:
    from lora_cli.steps.task_view import ReadExample, TaskFacts

app = typer.Typer(cls=Group, help="The examples of a task, as a base model reads them.")


@app.command(
    cls=Command,
    epilog=examples("lora task show task.jsonl", "lora task show task.jsonl -n 1 --test tasks/part.test.jsonl --json"),
)
@with_flags
def show(
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="Task file.", show_default="the setting data")
    ] = None,
    n: Annotated[int, typer.Option("-n", help="How many examples to print.", min=0)] = 3,
    test: Annotated[
        Path | None, typer.Option("--test", help="Test data to compare with.", show_default="the setting")
    ] = None,
    *,
    setup: Seeded,
    form: Document,
    prompts: Prompts,
) -> None:
    """Print examples as the base's tokens, and facts about the file: lengths, duplicates, examples that are too long.

    Tokens that are learnt and scored are in colour on a terminal, in brackets elsewhere. Only the base's tokenizer and
    configuration are loaded.
    """
    screen, prompting = form.screen(), prompts.prompting()
    settings = setup.load(data=file, test=test)
    if settings.data is None:
        raise UsageError("no task file", hint="name one, or set data in lora.toml")
    if settings.base is None and prompting.settings:
        raise UsageError("only a base model renders prompts", hint="give --base")
    rows = load_task(settings.data)
    tested = None if settings.test is None else load_task(settings.test)

    from lora_cli.steps import task_view

    encoder = None
    if settings.base is None:
        screen.say("no base model: lengths are in characters; give --base to see tokens")
    else:
        from lora_cli.models.ref import load_encoder

        encoder = load_encoder(settings.base, prompting=prompting)
    facts = task_view.look(rows, encoder, seed=settings.seed, test=tested)
    shown = [task_view.read(row, encoder) for row in rows[:n]]
    _show(screen, settings.data, settings.base, facts, shown)
    for line in task_view.summary_of(facts):
        screen.say(line)


def _show(screen: Screen, file: Path, base: str | None, facts: "TaskFacts", shown: "Sequence[ReadExample]") -> None:
    from dataclasses import asdict

    values = {"file": near(file), "base": base, **asdict(facts)}
    if screen.format == "json":
        screen.document("lora.task.show/1", {**values, "shown": [asdict(one) for one in shown]})
        return
    for one in shown:
        learnt = len(one.pieces) - one.start
        heading = (
            f"example {one.id}: {counted(len(one.ids), 'token')}, {learnt} of them learnt"
            if one.ids
            else f"example {one.id}"
        )
        screen.pieces(heading, [(text, place >= one.start) for place, text in enumerate(one.pieces)])
    screen.document("lora.task.show/1", values)


def register(root: typer.Typer) -> None:
    """Add `lora task` to the command tree."""
    root.add_typer(app, name="task")
