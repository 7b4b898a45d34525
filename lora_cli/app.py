"""The command tree, and the one place where a LoraError becomes an exit code."""

import errno
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from types import FrameType
from typing import Annotated, Any, Never, TextIO, cast

import typer
from typer.completion import completion_init  # type: ignore[attr-defined]
from typer.exceptions import TyperException

from lora_cli.commands.lazy import LazyGroup
from lora_cli.errors import ExitCode, LoraError, OutputError, Refused, shortage
from lora_cli.redaction import Redacting, hide
from lora_cli.screen import Screen
from lora_cli.text import nearest

SUMMARIES = {
    "demo": "Build a miniature world and run sync, select, merge, fit and eval on it; no network, no download.",
    "pool": "The adapters of the catalogue: find them, list them, fetch and check them.",
    "select": "Choose usable adapters of one base model and remember the choice.",
    "methods": "List the merge methods and the presets of fit, or explain one: its formula, its options, and when to "
    "use it.",
    "merge": "Merge adapters into one LoRA, by their updates and not factor by factor.",
    "fit": "Fit coefficients of adapters to a task, and merge with them.",
    "train": "Train a new LoRA on a task: the baseline that every fit has to beat.",
    "eval": "Evaluate adapters and the bare base on a task, with intervals, on one load of the base.",
    "study": "Compare ways to recycle a pool's adapters for a task, with the controls that keep the answer honest.",
    "convert": "Convert an adapter of another program into a PEFT folder.",
    "extract": "Make a LoRA of the difference between a fine-tuned model and its base, and report the error of each "
    "layer.",
    "bake": "Add an adapter to its base model, and report how much of the update survived.",
    "export": "Write an adapter in the form that another program reads, and check it by reading it back as the program "
    "does.",
    "serve-check": "Say what a server makes of an adapter's folder as it is: right, refused, or silently wrong.",
    "push": "Upload the adapter in a result's folder to the Hub, as one commit.",
    "diff": "Compare two adapters module by module: norms, cosine, principal angles in degrees, ranks; --json has the "
    "spectra.",
    "task": "The examples of a task, as a base model reads them.",
    "runs": "The recorded runs of all commands, with their inputs and outcomes.",
    "config": "Settings and where each comes from.",
    "completion": "Print the completion script of a shell, or install it.",
}
"""The commands, each in the file of its name below commands/; the first line of each one's help."""


_KEPT = {
    "demo": "finished parts are kept: the same command goes on from there",
    "pool sync": "the adapters read so far are kept: the same command goes on from there",
    "pool fetch": "the adapters fetched so far are kept: the same command goes on from there",
    "fit": "a state that was stored is kept: the same command, without --no-resume, goes on from there",
    "eval": "answers that were stored are kept: the same command, without --no-resume, goes on from there",
    "study": "done cells are kept: the same command goes on from there",
    "push": "the repository has all of the commit or nothing of it: the same command tells which, and finishes it",
    **dict.fromkeys(
        ("merge", "train", "bake", "convert", "extract", "export", "pool import", "pool export"),
        "nothing half-written is left: run the command again",
    ),
}
"""The message about the state that an interrupted command leaves, by command."""


_LESS = (
    "free some; eval and select take a smaller --batch-size, fit takes --grad-checkpointing; --device cpu spares a GPU"
)
"""What needs less memory."""


class Root(LazyGroup):
    """The `lora` command: runs a subcommand and turns errors into lines on stderr and an exit code."""

    package = "lora_cli.commands"
    summaries = SUMMARIES

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Never:
        completion_init()
        try:
            with _redacted():
                code = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except TyperException as error:
            context = getattr(error, "ctx", None)
            path = context.command_path if context else "lora"
            # The library behind Typer names its own class before the words.
            message = error.format_message().replace("Value error, ", "")
            _tell(message, f"{_nearest_choice(message)}see '{path} --help'")
            code = ExitCode.USAGE
        if code == ExitCode.INTERRUPTED:
            typed = " ".join(sys.argv[1:] if args is None else args)
            _tell(
                "interrupted",
                next((kept for name, kept in _KEPT.items() if typed.startswith(name)), "nothing was changed"),
            )
        sys.exit(code if isinstance(code, int) else ExitCode.OK)

    def make_context(self, *args: Any, **extra: Any) -> Any:
        # Help is printed while arguments are read.
        with _quiet_at_closed_pipes(), _told_of_full_disks():
            return super().make_context(*args, **extra)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        # Answers are looked for under the command that wrote them, too.
        asked = ["runs", "answers", *args[2:]] if args[:2] == ["eval", "show"] else args
        return super().resolve_command(ctx, asked)

    def invoke(self, ctx: Any) -> Any:
        try:
            with _quiet_at_closed_pipes(), _told_of_full_disks(), _true_to_interrupts():
                return super().invoke(ctx)
        except LoraError as error:
            _fail(error)
        except Exception as error:
            if not (said := shortage(error)):
                raise
            _fail(Refused(said, hint=_LESS))


@contextmanager
def _told_of_full_disks() -> Iterator[None]:
    """End the command with one line if a disk, or the file behind stdout, is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        if error.filename is None:
            _drop_stdout()
        _fail(OutputError(f"no space left on the disk: {error.filename or 'while writing'}"))


@contextmanager
def _true_to_interrupts() -> Iterator[None]:
    """Make an error after Ctrl-C the interrupt that it comes from: a library may catch it and fail otherwise."""
    try:
        yield
    except Exception:
        if not _interrupts:
            raise
        raise KeyboardInterrupt from None


@contextmanager
def _quiet_at_closed_pipes() -> Iterator[None]:
    """End the command with 0 if the reader of stdout closes the pipe."""
    try:
        yield
    except BrokenPipeError:
        _drop_stdout()
        raise typer.Exit(ExitCode.OK) from None


def _drop_stdout() -> None:
    """Send what is left of stdout nowhere: the interpreter must not complain when it flushes at exit."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(error: LoraError) -> Never:
    if os.environ.get("LORA_DEBUG", "0") != "0":
        _trace(error)
    _tell(error.message, error.hint)
    raise typer.Exit(error.exit_code) from None


def _trace(error: BaseException) -> None:
    """Print where an error arose: its lines are escaped like all other text, and never hold the values of variables."""
    for line in "".join(traceback.format_exception(error)).rstrip().split("\n"):
        Screen().say(line)


@contextmanager
def _redacted() -> Iterator[None]:
    """Redact all that any library writes to stdout and stderr; remarks of libraries are escaped, too."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        hide(os.environ.get(name, "").strip())
    out, err = cast(TextIO, Redacting(sys.stdout)), cast(TextIO, Redacting(sys.stderr))
    with redirect_stdout(out), redirect_stderr(err), warnings.catch_warnings():
        warnings.showwarning = lambda message, kind, *_: Screen().warn(f"{kind.__name__}: {message}")
        yield


def _tell(message: str, hint: str) -> None:
    screen = Screen()
    screen.say(f"lora: {message}")
    if hint:
        screen.say(f"  {hint}")


def _nearest_choice(message: str) -> str:
    """The hint with the choice nearest to the one that Typer's message refuses, "" if there is none."""
    given, _, choices = message.partition("' is not one of ")
    found = nearest(given.rpartition("'")[2], re.findall("'([^']*)'", choices))
    return f"{found} · " if found else ""


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        Screen().text(f"lora {version('lora-cli')}\n")
        raise typer.Exit


app = typer.Typer(
    cls=Root,
    name="lora",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and end.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    """Catalogue, select, merge, fit and evaluate pools of LoRA adapters."""


def main() -> None:
    """Console script."""
    _open_what_is_closed()
    for number in (signal.SIGTERM, signal.SIGHUP):
        # SIGTERM and SIGHUP clean up as Ctrl-C does; a SIGHUP ignored by nohup stays ignored.
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _end)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        app(prog_name="lora")
    except KeyboardInterrupt:
        # Before the work has begun, or after its end.
        sys.exit(ExitCode.INTERRUPTED)
    except Exception as error:
        # A bug: its traceback, without the library's own way of printing it.
        _trace(error)
        sys.exit(ExitCode.ERROR)


_interrupts: list[int] = []
"""The interrupts so far."""


def _interrupt(number: int, frame: FrameType | None) -> Never:
    _interrupts.append(number)
    signal.default_int_handler(number, frame)


def _end(number: int, frame: object) -> Never:
    # A second one must not interrupt the removal of unfinished work.
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


def _open_what_is_closed() -> None:
    """Open closed standard streams on the null device: else the next opened file would take their number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8", closefd=False))
