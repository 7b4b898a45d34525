"""The `lora` command and `python -m lora_cli`: an interrupt while the command tree is imported ends it quietly, too."""

import sys


def main() -> None:
    """Import the command tree and run it."""
    try:
        from lora_cli.app import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
