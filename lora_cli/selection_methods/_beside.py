"""Candidates beside a target, one module at a time: a few updates are in memory, however many candidates there are."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lora_cli.algebra.lowrank import LowRank, inner
from lora_cli.errors import Refused
from lora_cli.formats.reader import OpenAdapter, all_modules

Product = Callable[[LowRank, LowRank], float]


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums over modules: of products of each candidate with the target, and of squares of the candidates and target."""

    products: Sequence[float]
    candidates: Sequence[float]
    target: float

    def ratios(self) -> list[float]:
        """Σ products / √(Σ squares of the candidate · Σ squares of the target); 0 where one of these is 0."""
        # The root of the product of two would overflow earlier than the product of their roots.
        sizes = [square**0.5 * self.target**0.5 for square in self.candidates]
        return [product / size if size else 0.0 for product, size in zip(self.products, sizes, strict=True)]


def beside(candidates: Sequence[OpenAdapter], target: OpenAdapter) -> Iterator[tuple[int, LowRank, LowRank | None]]:
    """Every update of every candidate, module by module: the candidate's place, its update, and the target's or None.

    Raises:
        Refused: the update of a candidate or of the target cannot be read, or their shapes differ.
    """
    for module in all_modules([*candidates, target]):
        goal = target.read(module) if module in target.modules else None
        for place, candidate in enumerate(candidates):
            if module not in candidate.modules:
                continue
            update = candidate.read(module)
            if goal is not None and update.shape != goal.shape:
                sizes = ["×".join(map(str, shape)) for shape in (update.shape, goal.shape)]
                raise Refused(
                    f"{candidate.ref.id}: {module} is {sizes[0]} in it and {sizes[1]} in the target",
                    hint="these adapters belong to different base models",
                )
            yield place, update, goal


def product(x: LowRank, y: LowRank) -> float:
    """⟨x, y⟩ from the factors, as a number."""
    return float(inner(x, y))


def square(update: LowRank) -> float:
    """‖ΔW‖² from the factors, at least 0 where ranks cancel."""
    return max(0.0, product(update, update))


def sums(
    candidates: Sequence[OpenAdapter],
    target: OpenAdapter,
    times: Product = product,
    own: Callable[[LowRank], float] = square,
) -> Sums:
    """The sums over modules of `times` of a candidate's update and the target's, and of `own` of either."""
    products, squares = [0.0] * len(candidates), [0.0] * len(candidates)
    for place, update, goal in beside(candidates, target):
        squares[place] += own(update)
        if goal is not None:
            products[place] += times(update, goal)
    return Sums(products, squares, sum(own(target.read(module)) for module in target.modules))
