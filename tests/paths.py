"""Places that tests read: the project's root, and real adapters and bases where they are shared."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
