"""LowRank: a module's update as two factors, and the algebra on it. The dense update is formed only on request.

Shapes: B is (out, r), A is (r, in), the update is B @ A. Any scale (alpha/rank) is already folded into B.
"""

import math
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from itertools import islice

import torch
from torch import Tensor

from lora_cli.algebra import kernels
from lora_cli.algebra.grams import Grams, leading
from lora_cli.algebra.krylov import SMALL, Gains, Krylov, blocks, width_for

_BLOCKS = 5
# The largest share of the energy that k directions may hold if bfloat16 is to find them.
_FLAT = 0.5
# Squared norms from here to its inverse are searched in bfloat16: squares of their parts stay in fp32's range.
_TINY = 1e-20
# The fewest entries for which a copy in bfloat16 is worth its making.
_MANY_ENTRIES = 1 << 21
# The share of the energy from squared singular values in fp32 is no more precise than this.
_SHARE_NOISE = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """The update B @ A of one module: `B` (out, r), `A` (r, in), same dtype and device.

    `grams` are the Gram matrices of the factors, `known` or found when asked for. `formed` is the update itself where
    it is at hand.
    """

    B: Tensor
    A: Tensor
    grams: Grams = field(init=False, repr=False)
    formed: Tensor | None = field(default=None, kw_only=True, repr=False)
    known: InitVar[Grams | None] = field(default=None, kw_only=True)

    def __post_init__(self, known: Grams | None) -> None:
        if self.B.ndim != 2 or self.A.ndim != 2 or self.B.shape[1] != self.A.shape[0]:
            raise ValueError(f"factors do not fit: B {tuple(self.B.shape)}, A {tuple(self.A.shape)}")
        object.__setattr__(self, "grams", known or Grams([(self.B, self.A)]))

    @property
    def rank(self) -> int:
        """Inner dimension r; the numerical rank may be lower."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the update."""
        return self.B.shape[0], self.A.shape[1]

    def dense(self) -> Tensor:
        """The update itself, (out, in)."""
        return self.B @ self.A if self.formed is None else self.formed

    def terms(self) -> float:
        """Σ ‖b_j‖² ‖a_j‖² over the ranks: the scale on which a squared norm is rounding noise where ranks cancel."""
        if (known := self.grams.found) is not None:
            return float(known.terms.sum())
        return float((self.B.double().square().sum(0) * self.A.double().square().sum(1)).sum())

    def scaled(self, factor: float) -> "LowRank":
        """factor · update."""
        return self if factor == 1.0 else LowRank(self.B * factor, self.A)

    def norm(self) -> Tensor:
        """Frobenius norm, float64, from r × r Gram matrices."""
        return inner(self, self).clamp(min=0).sqrt()

    def to(self, place: torch.dtype | torch.device | str) -> "LowRank":
        """The same update with factors in a dtype, or on a device."""
        return LowRank(self.B.to(place), self.A.to(place))


def outgrown(rank: int, shape: tuple[int, int]) -> bool:
    """Whether factors of this rank hold as many numbers as the update (out, in) itself, or more."""
    return rank * sum(shape) >= math.prod(shape)


def bound(update: LowRank | Tensor) -> float:
    """A bound on every entry and on every partial sum; Inf or NaN if a number is not finite."""
    if isinstance(update, LowRank):
        return update.rank * bound(update.A) * bound(update.B)
    if update.numel() == 0:
        return 0.0
    # Infinities and NaN survive both the extremes and their products.
    low, high = torch.aminmax(update)
    return float(torch.maximum(-low, high))


def inner(x: LowRank, y: LowRank) -> Tensor:
    """Frobenius inner product ⟨x, y⟩ = Σ (B_xᵀB_y) ∘ (A_x A_yᵀ), a float64 scalar. O(r_x r_y (out + in)); P1."""
    return ((x.B.T.double() @ y.B.double()) * (x.A.double() @ y.A.T.double())).sum()


def gram(updates: Sequence[LowRank]) -> Tensor:
    """All inner products of N updates, (N, N) float64 on the CPU; pairs.all_pairs is the one for hundreds of updates.

    Each factor is widened once: N r (out + in) float64 numbers are held.
    """
    n = len(updates)
    products = torch.zeros(n, n, dtype=torch.float64)
    if n == 0:
        return products
    ranks = [update.rank for update in updates]
    b = torch.cat([update.B.T.double() for update in updates])  # (R, out)
    a = torch.cat([update.A.double() for update in updates])  # (R, in)
    owner = torch.arange(n).repeat_interleave(torch.tensor(ranks))
    start = 0
    for i, rank in enumerate(ranks):
        entries = (b[start : start + rank] @ b[start:].T) * (a[start : start + rank] @ a[start:].T)  # (r_i, R - start)
        products[i].index_add_(0, owner[start:], entries.sum(0).cpu())
        start += rank
    return products + products.triu(1).T


def squared_norm(delta: Tensor) -> float:
    """Squared Frobenius norm of a dense update, summed in float64."""
    return kernels.squares(delta)


def concat(updates: Sequence[LowRank], weights: Sequence[float] | Tensor, grams: Grams | None = None) -> LowRank:
    """Σ w_i · update_i, exactly, with rank Σ r_i; P2. Weights go into B.

    Args:
        grams: those of the updates side by side, without weights.
    """
    each = [torch.full((u.rank,), float(w), dtype=torch.float64) for u, w in zip(updates, weights, strict=True)]
    per_rank = torch.cat(each).to(updates[0].B.device)
    return LowRank(
        torch.cat([u.B for u in updates], dim=1).mul_(per_rank.to(updates[0].B.dtype)),  # (out, R)
        torch.cat([u.A for u in updates], dim=0),  # (R, in)
        known=grams and grams.weighted(per_rank),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Spectrum:
    """A compact SVD: update = U · diag(s) · Vᵀ with `U` (out, k), `s` (k,) descending, `V` (in, k)."""

    U: Tensor
    s: Tensor
    V: Tensor

    def truncated(self, k: int) -> LowRank:
        """The best rank-k approximation (Eckart–Young) with balanced factors U√s and √sVᵀ."""
        root = self.s[:k].sqrt()
        return LowRank(self.U[:, :k] * root, (self.V[:, :k] * root).T)


def svd(update: LowRank) -> Spectrum:
    """Compact SVD of B @ A by two QR factorisations and one SVD of an r × r core; P3. O(r²(out + in) + r³).

    Where r exceeds a side of the module the factors are as thin as that side, and nothing is lost.
    """
    q_b, r_b = torch.linalg.qr(update.B)  # (out, k_b), (k_b, r)
    q_a, r_a = torch.linalg.qr(update.A.T)  # (in, k_a), (k_a, r)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return Spectrum(q_b @ u, s, q_a @ vh.T)


def numerical_rank(s: Tensor) -> int:
    """The number of singular values (descending) above the rounding noise of their dtype."""
    if s.numel() == 0 or float(s[0]) == 0.0:
        return 0
    return int((s > 16 * torch.finfo(s.dtype).eps * s[0]).sum())


def dense_svd(delta: Tensor, k: int, *, seed: int = 0) -> Spectrum:
    """The k leading singular triplets of a dense update (out, in), by a randomised block Krylov method.

    Exact to rounding where two blocks reach a side. Elsewhere the best of up to five blocks of `krylov.blocks`, at
    least k + 10 wide, fewer where `Gains` tells that more would not help. The norm of what is left is within 0.1 % of
    the smallest possible one, as tests against dense SVD show; 0.04 % for TIES of 30 unrelated adapters of an 8B model.

    Large updates are searched in bfloat16 where the processor multiplies it natively, if k directions leave at least
    half of the energy: its rounding is far below that. Triplets are fp32's all the same, those of the projection on
    the k directions that were found.
    """
    if delta.shape[0] > delta.shape[1]:
        turned = dense_svd(delta.T, k, seed=seed)
        return Spectrum(turned.V, turned.s, turned.U)
    width = width_for(k)
    if 2 * width >= len(delta):
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        return Spectrum(u[:, :k], s[:k], vh[:k].T)
    total = squared_norm(delta)
    if _TINY < total < 1 / _TINY and _searched_in_bfloat16(delta):
        rough = _searched(delta.bfloat16(), k, width, total, most=_FLAT, seed=seed)
        found = rough and Krylov.on(rough.narrowed(k), delta)
        if found and float(found.gram.trace()) <= _FLAT * total:
            return Spectrum(*found.leading(k))
    found = _searched(delta, k, width, total, most=math.inf, seed=seed)
    assert found is not None
    return Spectrum(*found.leading(k))


def _searched(delta: Tensor, k: int, width: int, total: float, *, most: float, seed: int) -> Krylov | None:
    """Directions of an update of squared norm `total`, or None once k of them hold more than a share of `most`."""
    gains = Gains()
    for found in islice(blocks(delta, width, seed=seed), _BLOCKS):
        left = total - float(torch.linalg.eigvalsh(found.gram)[-k:].double().sum())
        if left < (1 - most) * total:
            return None
        if left > SMALL * total and gains.enough(left):
            break
    return found


def _searched_in_bfloat16(delta: Tensor) -> bool:
    if delta.device.type != "cpu" or delta.dtype != torch.float32 or delta.numel() < _MANY_ENTRIES:
        return False
    return bool(torch.cpu.get_capabilities().get("avx512_bf16"))


@dataclass(frozen=True, slots=True)
class RankChoice:
    """How the rank of a result is chosen, per module.

    `ceiling` is the highest rank that may come out (None: no limit). `energy` keeps the fewest leading directions that
    hold this share of the squared norm. Directions at the level of rounding noise are dropped unless `exact`, which
    leaves factors as they are. A share that fp32 cannot tell from 1 is all above that level.
    """

    ceiling: int | None = None
    energy: float | None = None
    exact: bool = False

    @property
    def share(self) -> float | None:
        """`energy`, or None if it asks for everything."""
        return None if self.energy is None or self.energy >= 1 - _SHARE_NOISE else self.energy

    def choose(self, s: Tensor, total: float) -> int:
        """The number of singular values `s` (descending) to keep; `total` is the squared norm of the whole update."""
        k = numerical_rank(s)
        if self.share is not None and total > 0:
            kept = s.double().square().cumsum(0) / total
            k = min(k, int((kept < self.share).sum()) + 1)
        return k if self.ceiling is None else min(k, self.ceiling)


@dataclass(frozen=True, slots=True, eq=False)
class Reduced:
    """An update brought to a lower rank, with the squared Frobenius norms before (`total`) and after (`kept`)."""

    update: LowRank
    total: float
    kept: float


def reduce(update: LowRank | Tensor, choice: RankChoice) -> Reduced:
    """Bring an update, factored or dense (out, in), to the rank that `choice` asks for."""
    if isinstance(update, Tensor):
        return _reduce_dense(update, choice, squared_norm(update))
    if choice.exact or update.rank == 0:
        total = float(inner(update, update))
        return Reduced(update, total, total)
    k = choice.ceiling
    if k is not None and choice.share is None:
        if outgrown(update.rank, update.shape):
            dense = update.dense()
            return _reduce_dense(dense, choice, float(torch.linalg.vector_norm(dense, dtype=torch.float64)) ** 2)
        # Gram matrices resolve what fp32 holds.
        found = (
            leading(update.B, update.A, update.grams, k)
            if update.rank >= 2 * k and update.B.dtype == torch.float32
            else None
        )
        if found is not None:
            return _reduced(Spectrum(found.U, found.s, found.V), found.total, choice)
    spectrum = svd(update)
    return _reduced(spectrum, float(spectrum.s.double().square().sum()), choice)


def _reduce_dense(update: Tensor, choice: RankChoice, total: float) -> Reduced:
    full = min(update.shape)
    if choice.share is None:
        width = min(choice.ceiling or full, full)
        return _reduced(dense_svd(update, width), total, choice)
    width = min(64, full)
    while True:
        reduced = _reduced(dense_svd(update, width), total, choice)
        enough = reduced.kept >= choice.share * total or reduced.update.rank < width
        if enough or width >= min(choice.ceiling or full, full):
            return reduced
        # The spectra here are flat and most directions are needed, so stop guessing.
        width = full


def _reduced(spectrum: Spectrum, total: float, choice: RankChoice) -> Reduced:
    k = choice.choose(spectrum.s, total)
    return Reduced(spectrum.truncated(k), total, float(spectrum.s[:k].double().square().sum()))
