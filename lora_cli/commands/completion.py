"""`lora completion`: scripts that complete commands, options and values in a shell."""

from typing import Annotated, Literal, get_args

import typer

from lora_cli.commands.options import examples
from lora_cli.screen import Screen

Shell = Literal["bash", "zsh", "fish", "pwsh"]
SHELLS = get_args(Shell)


def completion(shell: Annotated[Shell, typer.Argument(help="The shell.")]) -> None:
    """Print the completion script of a shell."""
    Screen().text(completion_script(shell))


def completion_script(shell: Shell) -> str:
    """The completion script of `shell`, as Typer makes it."""
    from typer.completion import get_completion_script  # type: ignore[attr-defined]

    return get_completion_script(prog_name="lora", complete_var="_LORA_COMPLETE", shell=shell).strip() + "\n"


def register(root: typer.Typer) -> None:
    """Add `lora completion` to the command tree."""
    root.command(epilog=examples("lora completion bash > ~/.lora-completion.bash", "lora completion fish | source"))(
        completion
    )
