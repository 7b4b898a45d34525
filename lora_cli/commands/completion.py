"""`lora completion`: scripts that complete commands, options and values in a shell."""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from lora_cli.commands.options import examples
from lora_cli.errors import UsageError
from lora_cli.screen import Screen

Shell = Literal["bash", "zsh", "fish", "pwsh"]
SHELLS: tuple[Shell, ...] = ("bash", "zsh", "fish", "pwsh")


def completion(
    shell: Annotated[Shell | None, typer.Argument(help="The shell.", show_default="the one in use")] = None,
    install: Annotated[bool, typer.Option("--install", help="Write the script where the shell finds it.")] = False,
) -> None:
    """Print the completion script of a shell, or install it."""
    chosen = shell or _own_shell()
    if not install:
        Screen().text(completion_script(chosen))
        return
    from typer.completion import install as write  # type: ignore[attr-defined]

    _, path = write(shell=chosen, prog_name="lora", complete_var="_LORA_COMPLETE")
    Screen().text(f"{path}\n")
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


def register(root: typer.Typer) -> None:
    """Add `lora completion` to the command tree."""
    root.command(epilog=examples("lora completion bash > ~/.lora-completion.bash", "lora completion --install"))(
        completion
    )
