"""A merge method's input for one module: the updates of the adapters that have it, and measures of them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, overload

from torch import Tensor

from lora_cli.algebra.lowrank import LowRank, gram

Per = Literal["module", "adapter"]
"""The scope of angles, norms and thresholds: each module by itself, or the whole adapter."""


class Whole(Protocol):
    """Measures over all modules of the adapters that have the module at hand, in its order."""

    def gram(self) -> Tensor:
        """Inner products of the whole updates, (n, n) float64."""

    def thresholds(self, density: float) -> Tensor:
        """The magnitude that the share `density` of each whole update's entries reaches, (n,)."""


@dataclass(frozen=True, slots=True, eq=False)
class Updates(Sequence[LowRank]):
    """The updates of n adapters in one module, all of shape (out, in), in an order that does not depend on the user
    but for an `ordered` method.

    keys: one integer per adapter, from its place, its commit and the module: the key for random numbers.
    scales: the alpha/rank that is folded into each B, for the per-factor methods, which reproduce others' results.
    whole: measures over the whole adapters; None if this is the only module.
    inputs: per adapter a sample of the module's activations, (tokens, in); empty unless the method needs it.
    absent: weights of the adapters that lack the module and count as updates of zero there.
    """

    items: tuple[LowRank, ...]
    keys: tuple[int, ...]
    scales: tuple[float, ...]
    whole: Whole | None = None
    inputs: tuple[Tensor, ...] = ()
    absent: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[LowRank]:
        return iter(self.items)

    @overload
    def __getitem__(self, index: int) -> LowRank: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[LowRank]: ...
    def __getitem__(self, index: int | slice) -> LowRank | Sequence[LowRank]:
        return self.items[index]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.items[0].shape

    @property
    def ranks(self) -> list[int]:
        """Rank of each."""
        return [update.rank for update in self.items]

    def gram(self, per: Per = "module") -> Tensor:
        """All inner products ⟨ΔW_i, ΔW_j⟩, (n, n) float64, of this module or of the whole adapters."""
        if per == "adapter" and self.whole is not None:
            return self.whole.gram()
        return gram(self.items)

    def moved(self, items: Iterable[LowRank]) -> "Updates":
        """The same adapters with their updates expressed in another space."""
        return replace(self, items=tuple(items), whole=None)
