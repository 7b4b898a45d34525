"""transformers, whose annotations do not bear strict checking, without its remarks about itself."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import transformers

hf: Any = transformers
hf.utils.logging.set_verbosity_error()
hf.utils.logging.disable_progress_bar()


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings of transformers and peft while the block runs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
