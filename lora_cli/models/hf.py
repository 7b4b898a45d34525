"""transformers and PEFT, whose annotations do not bear strict checking, without their remarks about themselves."""

import importlib
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import transformers

from lora_cli.hub.cache import offline

hf: Any = transformers
hf.utils.logging.set_verbosity_error()
hf.utils.logging.disable_progress_bar()
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def peft(part: str = "") -> Any:
    """A module of PEFT. Where bitsandbytes is installed PEFT imports it, and that would ask the Hub for code."""
    name = f"peft{part}"
    if name in sys.modules:
        return sys.modules[name]
    with offline():
        return importlib.import_module(name)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings of transformers and peft while the block runs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
