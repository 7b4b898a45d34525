"""The options that several commands share, spelled once."""

import functools
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lora_cli.errors import UsageError
from lora_cli.models.encode import Prompting, read_template
from lora_cli.screen import Format, Screen, near

Adapters = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="ADAPTER...",
        help="Ids of the catalogue or the Hub, folders, or - for stdin.",
        show_default="the last selection",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document.")]
Jsonl = Annotated[bool, typer.Option("--jsonl", help="One JSON object per line.")]
Csv = Annotated[bool, typer.Option("--csv", help="Comma-separated values with a header.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only ids, one per line.")]
Db = Annotated[Path | None, typer.Option("--db", help="Catalogue file.", show_default="the setting")]
Base = Annotated[
    str | None,
    typer.Option("--base", help="Base model: Hub id, with @revision if any, or folder.", show_default="the setting"),
]
Device = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.", show_default="auto")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="Precision of the base: auto, fp32, bf16, fp16.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of everything random.", show_default="0")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Output folder.", show_default="below ./lora-runs")]
Force = Annotated[bool, typer.Option("--force", help="Redo the work and replace the output.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan as data and change nothing.")]
Selection = Annotated[str | None, typer.Option("--selection", help="A selection's name, in place of ids.")]
Rank = Annotated[
    str, typer.Option("--rank", help="Rank of the result: a number, sum (of all ranks), or auto (up to rank 64).")
]
Energy = Annotated[
    float | None, typer.Option("--energy", help="Keep this share of the squared norm in each module, such as 0.99.")
]
Where = Annotated[
    list[str] | None,
    typer.Option("--where", help="Condition on a column, like 'rank<=16'; repeatable, all must hold."),
]

PROMPTING: Mapping[str, Any] = {
    "system": Annotated[str | None, typer.Option("--system", help="A system turn in front of every prompt.")],
    "chat_template": Annotated[
        Path | None,
        typer.Option(
            "--chat-template", metavar="FILE", help="Your own chat template (Jinja).", show_default="the base's own"
        ),
    ],
    "template_arg": Annotated[
        list[str] | None,
        typer.Option(
            "--template-arg",
            metavar="NAME=VALUE",
            help="A value for the chat template, such as enable_thinking=false; repeatable.",
        ),
    ],
    "no_chat_template": Annotated[bool, typer.Option("--no-chat-template", help="Read prompts as plain text.")],
    "allow_template_mismatch": Annotated[
        bool,
        typer.Option(
            "--allow-template-mismatch",
            help="Go on where a finished turn does not begin with its generation prompt; the cut is where they part.",
        ),
    ],
}
"""The options of a Prompting, by parameter; `with_prompting` adds them to a command."""


class Group(TyperGroup):
    """A command with commands below it: named without one it shows its help, in which every line is whole."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args or ([] if ctx.resilient_parsing else ["--help"]))

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        rows = [(name, self.commands[name].get_short_help_str(limit=200)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def screen_for(json: bool = False, jsonl: bool = False, csv: bool = False, quiet: bool = False) -> Screen:
    """The Screen for the output flags of a command; UsageError when more than one is given."""
    flags: dict[Format, bool] = {"json": json, "jsonl": jsonl, "csv": csv, "quiet": quiet}
    chosen = [name for name, on in flags.items() if on]
    if len(chosen) > 1:
        raise UsageError(f"--{chosen[0]} and --{chosen[1]} exclude each other")
    return Screen(chosen[0] if chosen else "auto")


def with_prompting(function: Callable[..., None]) -> Callable[..., None]:
    """`function` with the options of PROMPTING in place of its parameter `prompting`, a `Prompting`."""
    signature = inspect.signature(function)
    keyword, rest = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD
    own = [one for one in signature.parameters.values() if one.name != "prompting"]
    options = [
        inspect.Parameter(name, keyword, default=False if option.__origin__ is bool else None, annotation=option)
        for name, option in PROMPTING.items()
    ]
    parameters = [*(p for p in own if p.kind is not rest), *options, *(p for p in own if p.kind is rest)]

    @functools.wraps(function)
    def command(**values: Any) -> None:
        prompting = _prompting(**{name: values.pop(name) for name in PROMPTING})
        function(**values, prompting=prompting)

    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    return command


def _prompting(
    *,
    system: str | None,
    chat_template: Path | None,
    template_arg: Sequence[str] | None,
    no_chat_template: bool,
    allow_template_mismatch: bool,
) -> Prompting:
    """The Prompting that the options of PROMPTING describe."""
    arguments: dict[str, Any] = {}
    for text in template_arg or ():
        name, equals, value = _readable("--template-arg", text).partition("=")
        if not (equals and name.isidentifier()) or name in arguments:
            raise UsageError(f"--template-arg is NAME=VALUE, once per name, not {text!r}")
        arguments[name] = _json_or_text(value)
    return Prompting(
        system=_readable("--system", system or ""),
        template=None if chat_template is None else read_template(chat_template),
        arguments=arguments,
        templated=not no_chat_template,
        allow_mismatch=allow_template_mismatch,
    )


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _readable(option: str, text: str) -> str:
    """`text`, if it can be written as UTF-8: an argument may be any bytes."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UsageError(f"{option} is not UTF-8 text")
    return text


def show_output(screen: Screen, schema: str, folder: Path, record: Mapping[str, Any]) -> None:
    """The folder that a command made: its path, or as JSON its path with the run's record."""
    if screen.format == "json":
        screen.document(schema, {"out": str(folder), **record})
    else:
        screen.text(f"{near(folder)}\n")


def examples(*lines: str) -> str:
    """The closing part of a command's help: example lines that run as printed."""
    return "Examples:\n\n\b\n" + "\n".join(f"  {line}" for line in lines)
