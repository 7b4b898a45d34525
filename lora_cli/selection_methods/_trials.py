"""Candidates that answer the examples of a task, and the order in which their answers put them."""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any, NamedTuple


class Standing(NamedTuple):
    """How a candidate stands: the more examples it was judged on, then the higher its merit, the better.

    `merit` is its score where a higher one is better, else minus its score. `log_likelihood` is the mean per token of
    the expected answers in nats, None where it is not known.
    """

    examples: int
    merit: float
    log_likelihood: float | None = None

    @property
    def order(self) -> tuple[float, ...]:
        """The greater comes first: examples, merit, then the likelihood."""
        likelihood = -math.inf if self.log_likelihood is None else self.log_likelihood
        return (self.examples, self.merit, likelihood)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trials:
    """Candidates that can be judged on the first of a task's examples, the same ones for all.

    `names` holds `id@commit` of each, `examples` is their number. `judge(places, count)` judges these candidates on the
    first `count` examples; those that cannot be judged are not in its answer. `enough(places)` is the number of the
    first of a ranking that holds all which the selection will take, or all of it.
    """

    names: Sequence[str]
    examples: int
    judge: Callable[[Sequence[int], int], Mapping[int, Standing]]
    enough: Callable[[Sequence[int]], int]

    def ranked(self, found: Mapping[int, Standing]) -> list[int]:
        """The places of `found`, the best first."""
        return [*best_first({place: standing.order for place, standing in found.items()}, self.names)]


def best_first(order: Mapping[int, Any], names: Sequence[str]) -> Iterator[int]:
    """The places of `order`, the greatest value first; equal ones by a hash of the name, `id@commit`."""
    groups = groupby(sorted(order, key=order.__getitem__, reverse=True), order.__getitem__)
    return chain.from_iterable(sorted(equal, key=lambda place: _hashed(names[place])) for _, equal in groups)


def _hashed(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()
