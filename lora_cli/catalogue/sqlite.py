"""The only door to sqlite_utils."""

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def _without(*names: str) -> Iterator[None]:
    """Hide packages from an import: sqlite_utils imports numpy and pandas if installed, which takes 0.2 s."""
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


with _without("numpy", "pandas"):
    from sqlite_utils import Database, Migrations

__all__ = ["Database", "Migrations"]
