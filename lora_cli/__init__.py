"""Catalogue, select, merge, fit and evaluate pools of LoRA adapters.

`open_pool` is the door for notebooks: see docs/python.md. `errors` holds the exceptions.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_cli import errors
    from lora_cli.api import OpenPool, open_pool

__all__ = ["OpenPool", "errors", "open_pool"]


def __getattr__(name: str) -> Any:
    """Import names on first use, so that importing the package is fast."""
    import importlib

    if name == "errors":
        return importlib.import_module("lora_cli.errors")
    if name in __all__:
        return getattr(importlib.import_module("lora_cli.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
