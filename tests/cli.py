"""`lora` as a user types it, in this process: code, stdout and stderr."""

from typing import NamedTuple

from typer.testing import CliRunner

from lora_cli.app import app


class Told(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def lora(*words: str, stdin: str | None = None) -> Told:
    """Run a command; a bug of the tool comes out as the exception it is."""
    result = CliRunner().invoke(app, list(words), prog_name="lora", input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Told(result.exit_code, result.stdout, result.stderr)


def ok(*words: str, stdin: str | None = None) -> Told:
    """Run a command that has to succeed."""
    told = lora(*words, stdin=stdin)
    assert told.code == 0, told
    return told


def refused(code: int, *words: str, stdin: str | None = None) -> str:
    """Run a command that has to fail with this code, an empty stdout and one or two clear lines, which come back."""
    told = lora(*words, stdin=stdin)
    assert (told.code, told.out) == (code, ""), told
    assert told.err.strip(), told
    assert "Traceback" not in told.err
    return told.err
