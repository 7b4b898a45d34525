"""How many threads torch uses, and for how long; work on several threads whose results come in order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@contextmanager
def one_thread_each() -> Iterator[int]:
    """Restrict torch to one thread while the block runs; yields the number of workers to use instead.

    torch's own threads mostly wait for each other, above all on a busy machine.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def in_order(work: Callable[..., T], calls: Iterable[tuple[Any, ...]], workers: int, *, pending: int) -> Iterator[T]:
    """The results of `work(*call)` in the order of the calls; at most `pending` wait for the one that is next."""
    begun: deque[Future[T]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for call in calls:
                begun.append(pool.submit(work, *call))
                if len(begun) > pending:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
