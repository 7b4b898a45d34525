"""The speed of this machine, from a fraction of a second of work."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from statistics import median

import torch

from lora_cli.precision import torch_dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """The speed of this machine: multiplications a second, bytes hashed a second, seconds of a small operation."""

    products: float
    hashed: float
    call: float


@cache
def rates_of(device: str, dtype: str, threads: int) -> Rates:
    """The rates on a device by a tenth of a second of work, on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        side = 512 if device == "cpu" else 4096
        one = torch.ones(side, side, dtype=torch_dtype(dtype), device=device)
        tiny, block = torch.ones(8, 8, device=device), bytes(1 << 22)
        return Rates(
            products=side**3 / _time(lambda: (one @ one)[0, 0].item()),
            hashed=len(block) / _time(lambda: hashlib.sha256(block).digest()),
            call=_time(lambda: [tiny @ tiny for _ in range(100)]) / 100,
        )
    finally:
        torch.set_num_threads(before)


def _time(work: Callable[[], object]) -> float:
    """The median of five times, after a first one: other processes may slow this one down."""
    times = []
    for _ in range(6):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return median(times[1:])
