"""Limits of time that a loaded machine keeps: the least CPU time of a few calls, and impatience with the Hub."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest


def least_cpu(work: Callable[[], object], within: float) -> float:
    """The least CPU seconds of this process for a call, of at most three: neighbours slow some calls down.

    No other call follows one that ends `within` so many seconds.
    """
    least = float("inf")
    for _ in range(3):
        began = time.process_time()
        work()
        least = min(least, time.process_time() - began)
        if least < within:
            break
    return least


@contextmanager
def impatient(seconds: float = 1.0) -> Iterator[None]:
    """While the block runs, a request to the Hub ends after so many seconds. What has to succeed stands outside it."""
    with pytest.MonkeyPatch.context() as patch:
        for place in ("patience", "connection"):
            patch.setattr(f"lora_cli.hub.{place}.REQUEST_SECONDS", seconds)
        patch.setattr("lora_cli.hub.session.SILENCE_SECONDS", seconds)
        patch.setattr("lora_cli.hub.patience._FIRST_WORD", 0.1)
        patch.setattr("lora_cli.hub.patience._STEP", 0.05)
        yield
