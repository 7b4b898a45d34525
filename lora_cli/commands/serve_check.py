"""`lora serve-check`: what a server makes of an adapter's folder."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lora_cli.checks.serving import NAMES, PROGRAMS
from lora_cli.commands.options import Catalogued, Command, Document, examples, with_flags
from lora_cli.errors import Refused

if TYPE_CHECKING:
    Server = str
else:
    Server = Literal[NAMES]

_WORDS = {
    "right": "applies this folder as PEFT does",
    "wrong": "reads this folder otherwise than PEFT does, and says nothing",
    "refused": "refuses this folder",
}


def serve_check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The adapter's folder.", show_default=False)],
    server: Annotated[Server, typer.Option("--for", help="The program.", show_default=False)],
    *,
    setup: Catalogued,
    document: Document,
) -> None:
    """Say what a server makes of an adapter's folder as it is: right, refused, or silently wrong.

    The verdict follows the program's rules; nothing is started. Exit code 0 means right, 5 wrong or refused. The base's
    modules, if they can be found, tell which kinds of modules some layers lack.
    """
    from lora_cli.steps.export.serve_check import serve_check as step

    screen, settings = document.screen(), setup.load()
    judged, unknown, remedy = step(folder, server, settings.base)
    title = PROGRAMS[server].title
    found = {"folder": str(folder), "for": server, "program": title, "verdict": judged.verdict}
    if screen.format == "json":
        screen.document(
            "lora.serve-check/1", {**found, "reasons": list(judged.reasons), "factors": dict(judged.factors)}
        )
    else:
        screen.text(f"{judged.verdict}\n")
    reasons = "; ".join(judged.reasons)
    told = f"{title} {_WORDS[judged.verdict]}" + (f": {reasons}" if reasons else "")
    if unknown:
        screen.say(unknown)
    if judged.verdict != "right":
        raise Refused(told, hint=remedy)
    screen.say(f"serve-check: {told}")


def register(root: typer.Typer) -> None:
    """Add `lora serve-check` to the command tree."""
    root.command(
        "serve-check",
        cls=Command,
        epilog=examples(
            "lora serve-check pool/tarn/mirror --for vllm",
            "lora serve-check pool/tarn/mirror --for llama.cpp --json",
        ),
    )(with_flags(serve_check))
