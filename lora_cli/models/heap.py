"""What becomes of freed memory: glibc keeps it for later tensors, among gaps that they do not fit into."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_THRESHOLD: Final = -3
"""M_MMAP_THRESHOLD of mallopt(3)."""
_LARGE: Final = 1 << 17
KEPT: Final = 1 << 25
"""Below so many bytes glibc may keep the memory of a freed tensor; it gives that of larger ones back."""


def keeps_freed_memory(device: str) -> bool:
    """Whether freed tensors leave gaps: on a CPU, unless the user's environment has glibc give all memory back."""
    return device == "cpu" and "MALLOC_MMAP_THRESHOLD_" not in os.environ


@contextmanager
def given_back() -> Iterator[None]:
    """While the block runs, the memory of a tensor of 128 KiB or more goes back to the system when it is freed.

    That takes time: the system hands out each page anew, filled with zeros. Without glibc nothing changes.
    """
    change = getattr(ctypes.CDLL(None), "mallopt", None)
    if change is None or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        yield
        return
    change(_THRESHOLD, _LARGE)
    try:
        yield
    finally:
        # The threshold that glibc itself comes to after tensors of every size were freed.
        change(_THRESHOLD, KEPT)
