"""Writes docs/commands.md and completions/ from the command tree: python -m tests.generate [--check]."""

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.main import get_command

from lora_cli.app import app
from lora_cli.commands.config import SHELLS, completion_script

ROOT = Path(__file__).resolve().parents[1]
FILES = {"bash": "lora.bash", "zsh": "_lora", "fish": "lora.fish", "pwsh": "lora.ps1"}


def commands() -> Iterator[tuple[str, Any, Any]]:
    """Every command of the tree: its words, the command, its context."""

    def below(command: Any, words: str, parent: Any) -> Iterator[tuple[str, Any, Any]]:
        context = command.make_context(words.rpartition(" ")[2], [], parent=parent, resilient_parsing=True)
        yield words, command, context
        for name, child in getattr(command, "commands", {}).items():
            yield from below(child, f"{words} {name}", context)

    return below(get_command(app), "lora", None)


def reference() -> str:
    """docs/commands.md."""
    text = io.StringIO()
    text.write(
        "# Commands\n\nMade from the program by `python -m tests.generate`; what `--help` prints, command by command.\n"
    )
    for words, command, context in commands():
        text.write(f"\n## {words}\n\n```text\n{command.get_help(context).strip()}\n```\n")
    return text.getvalue()


def generated() -> dict[Path, str]:
    """Every generated file with what it has to hold."""
    files = {ROOT / "docs" / "commands.md": reference()}
    for shell in SHELLS:
        files[ROOT / "completions" / FILES[shell]] = completion_script(shell)
    return files


def main() -> int:
    stale = [file for file, text in generated().items() if not file.exists() or file.read_text("utf-8") != text]
    if "--check" in sys.argv:
        for file in stale:
            sys.stderr.write(f"{file.relative_to(ROOT)} is not what the program makes: python -m tests.generate\n")
        return 1 if stale else 0
    for file, text in generated().items():
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
