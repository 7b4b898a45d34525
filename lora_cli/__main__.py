"""The `lora` command and `python -m lora_cli`: an interrupt while the command tree is imported ends it quietly, too."""

import gc
import sys


def main() -> None:
    """Import the command tree and run it."""
    # What is imported stays: by Python's own thresholds a fifth of a start goes into looking for garbage in it.
    gc.set_threshold(20_000, 50, 100)
    try:
        from lora_cli.app import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
