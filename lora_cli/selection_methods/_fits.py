"""Adapters in an order, of which some at a time are fitted to a task."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Fits:
    """`names` holds `id@commit` of each adapter, the best first by another method; at most `most` are chosen.

    `loss(places)` is the validation loss of a fit over these adapters, infinite if there is none.
    """

    names: Sequence[str]
    most: int
    loss: Callable[[Sequence[int]], float]
