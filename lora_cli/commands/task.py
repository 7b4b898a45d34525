"""`lora task`: look at a task as a base reads it."""

from pathlib import Path
from typing import Annotated, Any

import typer

from lora_cli.commands.options import Base, Command, Group, Json, Prompts, Seed, examples, screen_for, with_flags
from lora_cli.errors import UsageError
from lora_cli.screen import Screen, near
from lora_cli.settings import load
from lora_cli.task import load_task

app = typer.Typer(cls=Group, help="What a task holds, as a base model reads it.")


@app.command(
    cls=Command,
    epilog=examples("lora task show task.jsonl", "lora task show task.jsonl -n 1 --test tasks/outer.test.jsonl --json"),
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
    base: Base = None,
    seed: Seed = None,
    json: Json = False,
    *,
    prompts: Prompts,
) -> None:
    """Print examples as the base's tokens, and what the file holds: lengths, duplicates, what does not fit.

    Tokens that are learnt and scored are in colour on a terminal, in brackets elsewhere. Of the base only the tokenizer
    and the configuration are loaded.
    """
    screen, prompting = screen_for(json), prompts.prompting()
    settings = load({"data": file, "test": test, "base": base, "seed": seed})
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
        from lora_cli.base_model import load_encoder

        encoder = load_encoder(settings.base, prompting=prompting)
    facts = task_view.look(rows, encoder, seed=settings.seed, test=tested)
    shown = [task_view.read(row, encoder) for row in rows[:n]]
    _show(screen, settings, facts, shown)
    tell(screen, facts)


def _show(screen: Screen, settings: Any, facts: Any, shown: list[Any]) -> None:
    from dataclasses import asdict

    values = {"file": near(settings.data), "base": settings.base, **asdict(facts)}
    if screen.format == "json":
        screen.document("lora.task.show/1", {**values, "shown": [asdict(one) for one in shown]})
        return
    for one in shown:
        learnt = len(one.pieces) - one.start
        heading = (
            f"example {one.id}: {len(one.ids)} tokens, {learnt} of them learnt" if one.ids else f"example {one.id}"
        )
        screen.pieces(heading, [(text, place >= one.start) for place, text in enumerate(one.pieces)])
    screen.document("lora.task.show/1", values)


def tell(screen: Screen, facts: Any) -> None:
    """Say what every command says about the task it reads: one line, and one more where something has no effect."""
    screen.say(_summary(facts))
    if facts.unread:
        screen.warn(f"prompts are the same without {', '.join(facts.unread)}: the chat template does not read it")


def _summary(facts: Any) -> str:
    lengths = facts.lengths
    parts = [
        f"data: {_counted(facts.examples, 'example')}",
        f"{facts.unit} median {lengths.median:,}, 95 % {lengths.p95:,}, longest {lengths.longest:,}",
        facts.too_long and f"{len(facts.too_long):,} longer than the base takes ({facts.takes:,})",
        facts.duplicates and _counted(facts.duplicates, "duplicate"),
        facts.across_split and f"{_counted(facts.across_split, 'validation prompt')} also in training",
        facts.in_test and f"{_counted(facts.in_test, 'test prompt')} also here",
        facts.one_token and f"{100 * facts.one_token / facts.examples:.0f} % one-token completions",
        facts.parted and f"{facts.parted:,} without a right cut",
        facts.early and f"{_counted(facts.early, 'answer')} with the end of a turn inside",
        facts.marked and f"{_counted(facts.marked, 'prompt')} with control tokens, see --no-chat-template",
    ]
    return " · ".join(filter(None, parts))


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'s'[: number != 1]}"
