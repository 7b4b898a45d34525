"""`lora completion`: scripts that complete commands, options and values in a shell."""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from lora_cli.commands.options import examples
from lora_cli.errors import UsageError
from lora_cli.outputs import whole_file
from lora_cli.screen import Screen

Shell = Literal["bash", "zsh", "fish", "pwsh"]
SHELLS: tuple[Shell, ...] = ("bash", "zsh", "fish", "pwsh")
_SCRIPTS = {"bash": ".bash_completions/lora.sh", "zsh": ".zfunc/_lora", "fish": ".config/fish/completions/lora.fish"}


def completion(
    shell: Annotated[Shell | None, typer.Argument(help="The shell.", show_default="the one in use")] = None,
    install: Annotated[bool, typer.Option("--install", help="Write the script where the shell finds it.")] = False,
) -> None:
    """Print the completion script of a shell, or install it."""
    chosen = shell or _own_shell()
    if not install:
        Screen().text(completion_script(chosen))
        return
    Screen().text(f"{_installed(chosen)}\n")
    Screen().say("completion works in new shells")


def _own_shell() -> Shell:
    """The shell of $SHELL, or without it (in a container) the calling one. UsageError if there is no script for it."""
    name = Path(os.environ.get("SHELL", "")).name or _calling_shell()
    for shell in SHELLS:
        if shell == name:
            return shell
    raise UsageError(f"no completion for the shell {name!r}", hint=f"name one: {', '.join(SHELLS)}")


def _calling_shell() -> str:
    from shellingham import ShellDetectionFailure, detect_shell  # type: ignore[import-untyped]

    try:
        return str(detect_shell()[0])
    except ShellDetectionFailure:
        raise UsageError("no shell is known: $SHELL is not set", hint=f"name one: {', '.join(SHELLS)}") from None


def completion_script(shell: Shell) -> str:
    """The completion script of `shell`, as Typer makes it."""
    from typer.completion import get_completion_script  # type: ignore[attr-defined]

    return get_completion_script(prog_name="lora", complete_var="_LORA_COMPLETE", shell=shell).strip() + "\n"


def _installed(shell: Shell) -> Path:
    """Write the script and the lines that load it; returns the script's path."""
    if shell == "pwsh":
        # PowerShell alone knows where its profile is.
        from typer.completion import install  # type: ignore[attr-defined]

        return Path(install(shell=shell, prog_name="lora", complete_var="_LORA_COMPLETE")[1])
    script = Path.home() / _SCRIPTS[shell]
    _put(script, completion_script(shell).encode())
    if shell == "bash":
        _add_lines(Path.home() / ".bashrc", f"source '{script}'")
    elif shell == "zsh":
        _add_lines(Path.home() / ".zshrc", "fpath+=~/.zfunc; autoload -Uz compinit; compinit")
    return script


def _add_lines(file: Path, line: str) -> None:
    """Add a line to the user's own file, unless it is there."""
    before = file.read_bytes() if file.exists() else b""
    if line.encode() not in before:
        _put(file, before + b"\n" * (before[-1:] not in (b"", b"\n")) + line.encode() + b"\n")


def _put(file: Path, data: bytes) -> None:
    """Write a file of the user, whole or not at all. A link stays a link, and the file's mode stays."""
    place = file.resolve()
    with whole_file(place) as new:
        if place.exists():
            os.fchmod(new.fileno(), place.stat().st_mode)
        new.write(data)


def register(root: typer.Typer) -> None:
    """Add `lora completion` to the command tree."""
    root.command(epilog=examples("lora completion bash > ~/.lora-completion.bash", "lora completion --install"))(
        completion
    )
