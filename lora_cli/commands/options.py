"""The options that several commands share, spelled once."""

import functools
import inspect
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.exceptions import TyperException

from lora_cli.columns import Column, chosen
from lora_cli.commands import completing
from lora_cli.commands.panels import write_panels
from lora_cli.errors import UsageError
from lora_cli.merge_options import METHODS
from lora_cli.models.forms import Prompting, read_template
from lora_cli.options import Flag, Options, setting
from lora_cli.plots.figure import demand_plottable
from lora_cli.precision import Loading
from lora_cli.records import Adapter
from lora_cli.screen import Form, Format, Screen, near
from lora_cli.settings import Settings, load
from lora_cli.task import Task, read_task
from lora_cli.text import about, size

if TYPE_CHECKING:
    # Typer keeps its copy of Click private; its classes are named here for the types alone.
    from typer._click import Context, HelpFormatter

    from lora_cli.steps.estimate import Estimate

Adapters = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="ADAPTER...",
        help="Ids of the catalogue or the Hub, folders, or - for stdin.",
        show_default="the last selection",
        autocompletion=completing.adapters,
    ),
]
Selection = Annotated[
    str | None,
    typer.Option("--selection", help="A selection's name, in place of ids.", autocompletion=completing.selections),
]
Where = Annotated[
    list[str] | None,
    typer.Option(
        "--where",
        help="Condition on a column, like 'rank<=16'; repeatable, all must hold.",
        autocompletion=completing.conditions,
    ),
]

Resume = Annotated[bool, typer.Option("--resume/--no-resume", help="Go on from what a killed run left, or begin anew.")]

PlotFlag = Annotated[Path | None, Flag(help="Draw a picture too: a file whose name ends in .png or .svg.")]
SeedFlag = Annotated[int | None, Flag(help="Seed of everything random.", default="0")]

PROMPTS = "How prompts are read"
OUTPUT = "Output"


class Stored(Options, frozen=True, kw_only=True):
    """The catalogue."""

    db: Annotated[Path | None, Flag(help="Catalogue file.", default="the setting")] = None

    def load(self, **more: object) -> Settings:
        """The settings, with these options, and `more` settings by name, overriding all other sources."""
        return load({name: getattr(self, name) for name in self.__struct_fields__} | more)


class Catalogued(Stored, frozen=True, kw_only=True):
    """`Stored`, and the user's base model."""

    base: Annotated[
        str | None, Flag(help="Base model: Hub id, with @revision if any, or folder.", default="the setting")
    ] = None


class Seeded(Catalogued, frozen=True, kw_only=True):
    """`Catalogued`, and the seed."""

    seed: SeedFlag = None


class Computed(Catalogued, frozen=True, kw_only=True):
    """`Catalogued`, and the device of the arithmetic."""

    device: Annotated[str | None, Flag(help="auto, cpu, cuda, cuda:N or mps.", default="auto")] = None


class Loaded(Computed, frozen=True, kw_only=True):
    """`Computed`, for a command that loads the base model."""

    dtype: Annotated[Loading | None, Flag(help="Precision in which the base is loaded.", default="auto")] = None
    seed: SeedFlag = None


class OnTask(Loaded, frozen=True, kw_only=True):
    """`Loaded`, for a command that learns from a task."""

    data: Annotated[Path | None, Flag(help="Task file, one JSON example per line.", default="the setting")] = None

    def task(self, settings: Settings, *, labelled: bool = True, valid: Path | None = None) -> Task:
        """The task, see `read_task`; DataError for a malformed one. UsageError if no option and no setting names it."""
        if settings.data is None:
            raise UsageError("no task file", hint="give --data FILE.jsonl, or set data in lora.toml")
        return read_task(settings.data, labelled=labelled, valid=valid)


class Listing(Options, frozen=True, kw_only=True):
    """The output format of rows. `table` holds the columns that the command has, () where its input decides."""

    columns: Annotated[
        str, Flag(help="The columns to show, in this order.", metavar="A,B,…", default="the usual ones")
    ] = ""
    fmt: Annotated[
        Form | None, Flag(help="table, tsv, csv, json, jsonl or md.", metavar="FORMAT", default="table, in a pipe tsv")
    ] = None
    json: Annotated[bool, Flag(help="One JSON document.")] = False
    jsonl: Annotated[bool, Flag(help="One JSON object per line.")] = False
    csv: Annotated[bool, Flag(help="Comma-separated values with a header.")] = False
    quiet: Annotated[bool, Flag(help="Only ids, one per line.", short="-q")] = False
    table: tuple[Column, ...] = ()

    def screen(self) -> Screen:
        """The Screen for these flags.

        Raises:
            UsageError: more than one format, an unknown column, or columns with --quiet.
        """
        names = [name.strip() for name in self.columns.split(",") if name.strip()]
        if names and self.quiet:
            raise UsageError("-q prints ids alone: leave out --columns")
        if self.table:
            chosen(self.table, names)
        return screen_for(self.json, self.jsonl, self.csv, self.quiet, fmt=self.fmt, columns=names)


class DrawnListing(Listing, frozen=True, kw_only=True):
    """`Listing`, with a picture."""

    plot: PlotFlag = None

    def __post_init__(self) -> None:
        demand_plottable(self.plot)


class Document(Options, frozen=True, kw_only=True):
    """The output format of a single result."""

    json: Annotated[bool, Flag(help="One JSON document.")] = False

    def screen(self) -> Screen:
        """The Screen for this flag."""
        return screen_for(self.json)


class JobOptions(Document, frozen=True, kw_only=True):
    """The place of a job's output, and how the job is reported."""

    out: Annotated[Path | None, Flag(help="Output folder.", short="-o", default="below ./lora-runs", panel=OUTPUT)] = (
        None
    )
    force: Annotated[bool, Flag(help="Redo the work and replace the output.", panel=OUTPUT)] = False
    dry_run: Annotated[bool, Flag(help="Print the plan as data and change nothing.", panel=OUTPUT)] = False


class DrawnJob(JobOptions, frozen=True, kw_only=True):
    """`JobOptions`, with a picture."""

    plot: PlotFlag = None

    def __post_init__(self) -> None:
        demand_plottable(self.plot)


class Prompts(Options, frozen=True, kw_only=True):
    """How the examples of a task become prompts."""

    system: Annotated[str, Flag(help="A system turn in front of every prompt.", panel=PROMPTS)] = ""
    chat_template: Annotated[
        Path | None,
        Flag(help="Your own chat template (Jinja).", metavar="FILE", default="the base's own", panel=PROMPTS),
    ] = None
    template_arg: Annotated[
        tuple[str, ...],
        Flag(
            help="A value for the chat template, such as enable_thinking=false; repeatable.",
            metavar="NAME=VALUE",
            panel=PROMPTS,
        ),
    ] = ()
    no_chat_template: Annotated[bool, Flag(help="Read prompts as plain text.", panel=PROMPTS)] = False
    allow_template_mismatch: Annotated[
        bool,
        Flag(
            help="Accept a finished turn that does not begin with its generation prompt; cut where the two differ.",
            panel=PROMPTS,
        ),
    ] = False

    def prompting(self) -> Prompting:
        """The Prompting that these options describe. UsageError for a malformed one."""
        arguments: dict[str, Any] = {}
        for text in self.template_arg:
            name, equals, value = _readable("--template-arg", text).partition("=")
            if not (equals and name.isidentifier()) or name in arguments:
                raise UsageError(f"--template-arg is NAME=VALUE, once per name, not {text!r}")
            arguments[name] = _value(value)
        return Prompting(
            system=_readable("--system", self.system),
            template=None if self.chat_template is None else read_template(self.chat_template),
            template_name="" if self.chat_template is None else near(self.chat_template),
            arguments=arguments,
            templated=not self.no_chat_template,
            allow_mismatch=self.allow_template_mismatch,
        )


class Command(TyperCommand):
    """A command whose help lists its options below the headings of their panels."""

    def parse_args(self, ctx: "Context", args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except TyperException as error:  # that of an option without its value comes without its command
            error.ctx = getattr(error, "ctx", None) or ctx  # type: ignore[attr-defined]
            raise

    def left_out(self, ctx: "Context") -> Collection[str]:
        """The options hidden from the help, by the names of their parameters."""
        return ()

    def added(self, ctx: "Context") -> Mapping[str, list[tuple[str, str]]]:
        """Rows (option, help) that the help lists first, by heading."""
        return {}

    def format_options(self, ctx: "Context", formatter: "HelpFormatter") -> None:
        write_panels(self.get_params(ctx), ctx, formatter, self.left_out(ctx), self.added(ctx))


class Group(TyperGroup):
    """A command with subcommands: without one it shows its help, whose lines are not cut off."""

    def parse_args(self, ctx: "Context", args: list[str]) -> list[str]:
        return super().parse_args(ctx, args or ([] if ctx.resilient_parsing else ["--help"]))

    def format_commands(self, ctx: "Context", formatter: "HelpFormatter") -> None:
        rows = [(name, self.commands[name].get_short_help_str(limit=200)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def screen_for(
    json: bool = False,
    jsonl: bool = False,
    csv: bool = False,
    quiet: bool = False,
    *,
    fmt: Form | None = None,
    columns: Sequence[str] = (),
) -> Screen:
    """The Screen for the output flags of a command; UsageError if more than one format is given."""
    flags: dict[Format, bool] = {"json": json, "jsonl": jsonl, "csv": csv, "quiet": quiet}
    given = [name for name, on in flags.items() if on]
    if len([*given, *filter(None, [fmt])]) > 1:
        other = given[1] if len(given) > 1 else f"fmt {fmt}"
        raise UsageError(f"--{given[0]} and --{other} exclude each other")
    return Screen(given[0] if given else fmt or "auto", columns)


def with_flags(function: Callable[..., None]) -> Callable[..., None]:
    """`function` with one option per flag of each parameter that is an `Options` record.

    A parameter `Annotated[Listing, COLUMNS]` gets these columns as its table.
    """
    signature = inspect.signature(function)
    records, tables = dict[str, type[Options]](), dict[str, tuple[Column, ...]]()
    for name, one in signature.parameters.items():
        kind = getattr(one.annotation, "__origin__", one.annotation)
        if isinstance(kind, type) and issubclass(kind, Options):
            records[name] = kind
            tables[name] = next(iter(getattr(one.annotation, "__metadata__", ())), ())
    parameters = [one for name, one in signature.parameters.items() if name not in records]
    flags = {place: record.flags() for place, record in records.items()}
    for place, record in records.items():
        completed = {**_COMPLETED, "columns": completing.columns([one.key for one in tables[place]])}
        parameters += [_parameter(name, *flag, record, completed.get(name)) for name, flag in flags[place].items()]

    @functools.wraps(function)
    def command(**values: object) -> None:
        for name, record in records.items():
            taken = {field: values.pop(field) for field in flags[name]}
            given = {field: tuple(v) if isinstance(v, list) else v for field, v in taken.items() if v is not None}
            values[name] = record(**given, **({"table": tables[name]} if tables[name] else {}))
        function(**values)

    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    return command


_COMPLETED: Mapping[str, completing.Complete] = {
    "selection": completing.selections,
    "target": completing.adapters,
    "where": completing.conditions,
    "method": lambda incomplete: [name for name in METHODS.methods if name.startswith(incomplete)],
}
"""The completion functions for the flags of records, by field."""


def _parameter(
    name: str, kind: type, flag: Flag, record: type[Options], completed: completing.Complete | None
) -> inspect.Parameter:
    """The parameter that makes Typer add the option of a record's field."""
    default = inspect.signature(record).parameters[name].default
    called = (flag.name or setting(name)).replace("_", "-")
    option = typer.Option(
        f"--{called}" if len(called) > 1 else f"-{called}",
        *([flag.short] if flag.short else []),
        help=flag.help,
        metavar=flag.metavar or None,
        min=flag.minimum,
        show_default=flag.default or default not in (None, False, "", ()),
        rich_help_panel=flag.panel or None,
        autocompletion=completed,
    )
    plain = list[str] if kind == tuple[str, ...] else kind
    shown = None if flag.default or default == () else default
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=shown, annotation=Annotated[plain | None, option]
    )


# Accept True, False and None as JSON: a template would take the text "False" as true.
_WORDS = {"true": True, "false": False, "null": None, "none": None}


def _value(value: str) -> object:
    """The value of an argument: a JSON word however it is capitalised, else JSON where it is JSON, else text."""
    if value.strip().lower() in _WORDS:
        return _WORDS[value.strip().lower()]
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _readable(option: str, text: str) -> str:
    """`text`, if it can be written as UTF-8: an argument may be any bytes."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UsageError(f"{option} is not UTF-8 text")
    return text


def downloads(absent: Sequence[Adapter]) -> dict[str, Any]:
    """The downloads that a command needs before it can plan further, as data."""
    return {"fetch": [row.ref.pinned for row in absent], "fetch_bytes": sum(row.bytes for row in absent)}


_NEEDS = (
    Column("NEEDED", "needed"),
    Column("AMOUNT", "amount", "right", show=lambda row: row["words"]),
)


def show_plan(screen: Screen, schema: str, plan: Mapping[str, Any], needs: "Estimate | None") -> None:
    """Print the plan of a job and its needs; without an estimate, say that the base model is not here."""
    if needs is None:
        screen.document(schema, plan)
        screen.say("no estimate of memory and time: the base model is not on this machine")
        return
    if screen.format == "json":
        screen.document(schema, {**plan, "estimate": asdict(needs)})
        return
    screen.document(schema, plan)
    amounts = {f"memory: {name}": count for name, count in needs.parts.items()}
    amounts |= {"read": needs.read_bytes, "written": needs.written_bytes, "memory": needs.memory_bytes}
    rows = [{"needed": name, "amount": count, "words": size(count)} for name, count in amounts.items()]
    rows.append({"needed": "time", "amount": float(f"{needs.seconds:.3g}"), "words": about(needs.seconds)})
    screen.rows(schema, _NEEDS, rows)


def show_output(screen: Screen, schema: str, folder: Path, record: Mapping[str, Any]) -> None:
    """Print the folder that a command made: its path, or as JSON its path with the run's record."""
    if screen.format == "json":
        screen.document(schema, {"out": str(folder), **record})
    else:
        screen.text(f"{near(folder)}\n")


def examples(*lines: str) -> str:
    """The closing part of a command's help: example lines that run as printed."""
    return "Examples:\n\n\b\n" + "\n".join(f"  {line}" for line in lines)
