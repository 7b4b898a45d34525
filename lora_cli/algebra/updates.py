"""A merge method's input for one module: the updates of the adapters that have it, and measures of them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, Protocol, overload

import torch
from torch import Tensor

from lora_cli.algebra.grams import Grams
from lora_cli.algebra.lowrank import LowRank, concat, gram, inner, outgrown

# A squared norm below this share of its terms is computed in float64.
_CANCELLED = 1e-3

# Weights that are others times a factor but for this share, rounding of float64, have their sum times the factor.
_PROPORTIONAL = 1e-13

Per = Literal["module", "adapter"]
"""The scope of angles, norms and thresholds: each module by itself, or the whole adapter."""


class Whole(Protocol):
    """Measures over all modules of the adapters that have the module at hand, in its order."""

    def gram(self) -> Tensor:
        """Inner products of the whole updates, (n, n) float64."""

    def thresholds(self, density: float) -> Tensor:
        """The magnitude that the share `density` of each whole update's entries reaches, (n,)."""


@dataclass(frozen=True, eq=False)
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
    grams: Grams = field(init=False, repr=False)
    """Those of all updates side by side."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "grams", Grams([(update.B, update.A) for update in self.items]))

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

    @cached_property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.items[0].shape

    @cached_property
    def ranks(self) -> list[int]:
        """Rank of each."""
        return [update.rank for update in self.items]

    def gram(self, per: Per = "module") -> Tensor:
        """All inner products ⟨ΔW_i, ΔW_j⟩, (n, n) float64, of this module or of the whole adapters."""
        if per == "adapter" and self.whole is not None:
            return self.whole.gram()
        return gram(self.items) if self.outgrown else self._by_owner(self.grams.wide().products)

    @cached_property
    def outgrown(self) -> bool:
        """Whether all factors together hold as many numbers as one dense update, or more."""
        return outgrown(sum(self.ranks), self.shape)

    def sum(self, weights: Tensor) -> LowRank:
        """Σ w_i ΔW_i, exactly and at rank Σ r_i; weights (n,)."""
        found = concat(self.items, weights, self.grams)
        for before, dense in self._sums:
            factor = (weights @ before) / (before @ before)
            if torch.allclose(before * factor, weights, rtol=_PROPORTIONAL, atol=0):
                return LowRank(found.B, found.A, formed=dense * float(factor), known=found.grams)
        return found

    @cached_property
    def _sums(self) -> list[tuple[Tensor, Tensor]]:
        """Weights, and the sum (out, in) that was formed with them to measure it."""
        return []

    def squares(self, per: Per = "module") -> Tensor:
        """‖ΔW_i‖², (n,) float64 on the CPU, of this module or of the whole adapters."""
        if per == "adapter" and self.whole is not None:
            return self.whole.gram().diagonal().clamp(min=0)
        return self._squares

    @cached_property
    def _squares(self) -> Tensor:
        found = self.grams.found
        if found is None:
            return torch.tensor([_square(update) for update in self.items], dtype=torch.float64)
        squares = self._by_owner(found.products).diagonal()
        # A sum of products that cancel is known from Gram matrices in fp32 only to the rounding of its terms.
        doubtful = squares < _CANCELLED * self._by_owner(found.terms.diag()).diagonal()
        exact = [_square(update) if doubt else 0.0 for update, doubt in zip(self.items, doubtful.tolist(), strict=True)]
        return torch.where(doubtful, squares.new_tensor(exact), squares)

    def square_of_sum(self, weights: Tensor, per: Per = "module") -> Tensor:
        """‖Σ w_i ΔW_i‖², a float64 scalar on the CPU, to rounding of the updates' precision; weights (n,)."""
        if per == "adapter" and self.whole is not None:
            return weights @ self.whole.gram() @ weights
        if self.outgrown:
            dense = self.sum(weights).dense()
            self._sums[:] = [(weights, dense)]
            norm: Tensor = torch.linalg.vector_norm(dense, dtype=torch.float64)
            return norm.square().cpu()
        return weights @ self._by_owner(self.grams.any().products) @ weights

    def _by_owner(self, products: Tensor) -> Tensor:
        """The sums of numbers (R, R) over the ranks of each pair of updates, (n, n) on the CPU."""
        owner = torch.arange(len(self)).repeat_interleave(torch.tensor(self.ranks))
        rows = products.new_zeros(len(self), len(owner), device="cpu").index_add_(0, owner, products.cpu())
        return rows.new_zeros(len(self), len(self)).index_add_(1, owner, rows)

    def moved(self, items: Iterable[LowRank]) -> "Updates":
        """The same adapters with their updates expressed in another space."""
        return replace(self, items=tuple(items), whole=None)


def _square(update: LowRank) -> float:
    return max(0.0, float(inner(update, update)))
