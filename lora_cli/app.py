"""The command tree, and the one place where a LoraError becomes an exit code."""

import errno
import importlib.metadata
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Never

import typer
from typer.completion import completion_init  # type: ignore[attr-defined]
from typer.exceptions import TyperException

from lora_cli.commands import bake, config, demo, diff, eval, fit, merge, methods, pool, runs, select, task, train
from lora_cli.commands.options import Group
from lora_cli.errors import ExitCode, LoraError, OutputError, Refused
from lora_cli.screen import Screen


class Root(Group):
    """The `lora` command: runs a subcommand and turns what went wrong into lines on stderr and an exit code."""

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
            code = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except TyperException as error:
            context = getattr(error, "ctx", None)
            path = context.command_path if context else "lora"
            _tell(error.format_message(), f"see '{path} --help'")
            code = ExitCode.USAGE
        except typer.Abort:
            code = ExitCode.INTERRUPTED
        sys.exit(code if isinstance(code, int) else ExitCode.OK)

    def list_commands(self, ctx: Any) -> list[str]:
        """In the order in which the work is done."""
        order = [
            *("demo", "pool", "select", "methods", "merge", "fit", "train", "eval", "bake", "diff"),
            *("task", "runs", "config", "completion"),
        ]
        return sorted(super().list_commands(ctx), key=lambda name: order.index(name))

    def make_context(self, *args: Any, **extra: Any) -> Any:
        # Help is printed while arguments are read.
        with _quiet_at_closed_pipes():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: Any) -> Any:
        try:
            with _quiet_at_closed_pipes():
                return super().invoke(ctx)
        except LoraError as error:
            _fail(error)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            _fail(OutputError(f"no space left on the disk: {error.filename or 'while writing'}"))
        except (MemoryError, RuntimeError) as error:
            # torch's own class for it would want torch to be imported.
            if type(error).__name__ not in ("OutOfMemoryError", "MemoryError"):
                raise
            _fail(Refused("out of memory", hint="free some, give a smaller --batch-size, or use --device cpu"))


@contextmanager
def _quiet_at_closed_pipes() -> Iterator[None]:
    """A reader that has what it wanted ends the command with 0."""
    try:
        yield
    except BrokenPipeError:
        # The interpreter must not complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(ExitCode.OK) from None


def _fail(error: LoraError) -> Never:
    if os.environ.get("LORA_DEBUG", "0") != "0":
        traceback.print_exception(error)
    _tell(error.message, error.hint)
    raise typer.Exit(error.exit_code) from None


def _tell(message: str, hint: str) -> None:
    screen = Screen()
    screen.say(f"lora: {message}")
    if hint:
        screen.say(f"  {hint}")


def _version(wanted: bool) -> None:
    if wanted:
        Screen().text(f"lora {importlib.metadata.version('lora-cli')}\n")
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


demo.register(app)
app.add_typer(pool.app, name="pool")
select.register(app)
methods.register(app)
merge.register(app)
fit.register(app)
train.register(app)
eval.register(app)
bake.register(app)
diff.register(app)
app.add_typer(task.app, name="task")
app.add_typer(runs.app, name="runs")
app.add_typer(config.app, name="config")
config.register(app)


def main() -> None:
    """Console script."""
    _open_what_is_closed()
    for number in (signal.SIGTERM, signal.SIGHUP):
        # A batch system's end and a closed terminal clean up as Ctrl-C does; who started this with nohup meant it.
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _end)
    app(prog_name="lora")


def _end(number: int, frame: object) -> Never:
    sys.exit(128 + number)


def _open_what_is_closed() -> None:
    """Standard streams that the caller closed lead nowhere: else the next file to be opened would take their place."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8", closefd=False))
