"""Gram matrices of factors side by side, and the leading directions of an update from them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

# Features whose products are summed in a narrow precision; rows of a product at a time, at least and as a share of all,
# so that most of the half below the diagonal is left out.
_FEATURES, _ROWS, _SHARE = 4096, 128, 8
# The squared error may exceed the least possible one by this share; the error then exceeds it by half of it.
_EXCESS = 1e-3
# How far off the squared norm of the whole may be, relatively.
_MEASURED = 1e-6
# The rounding error of a sum of products, in roundings of the root of their summed squares.
_ROUNDINGS = 4


@dataclass(frozen=True, slots=True, eq=False)
class Gram:
    """BᵀB (`b`) and AAᵀ (`a`), (R, R) float64, from products of the precision `dtype`."""

    b: Tensor
    a: Tensor
    dtype: torch.dtype

    @property
    def products(self) -> Tensor:
        """⟨b_i a_i, b_j a_j⟩ of the terms of B A, (R, R)."""
        return self.b * self.a

    @property
    def terms(self) -> Tensor:
        """‖b_i‖² ‖a_i‖² of the terms, (R,)."""
        return self.b.diagonal() * self.a.diagonal()

    def in_range(self) -> bool:
        """Whether every square of a row or column fits into the precision with all its digits."""
        limits = torch.finfo(self.dtype)
        least, most = limits.tiny / limits.eps, limits.max * limits.eps
        return all(bool(((least <= side.diagonal()) & (side.diagonal() <= most)).all()) for side in (self.b, self.a))

    def weighted(self, weights: Tensor) -> "Gram":
        """That of B diag(weights) and A, `weights` (R,)."""
        return Gram(weights[:, None] * self.b * weights, self.a, self.dtype)

    def turned(self) -> "Gram":
        """That of Aᵀ and Bᵀ."""
        return Gram(self.a, self.b, self.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Grams:
    """The Gram matrices of [w_1 B_1, …] and [A_1; …], computed in a precision when first asked for.

    factors: B_i (out, r_i) and A_i (r_i, in).
    weights: w, one per rank, (R,) float64; None for 1.
    """

    factors: Sequence[tuple[Tensor, Tensor]]
    weights: Tensor | None = None
    _plain: dict[torch.dtype, Gram] = field(default_factory=dict)

    def weighted(self, weights: Tensor) -> "Grams":
        """Those of the same factors with other weights: what is found for one serves both."""
        return Grams(self.factors, weights, self._plain)

    def at(self, dtype: torch.dtype) -> Gram | None:
        """The Gram matrices from products in a precision; None where fp32 lacks the range. O(R² (out + in))."""
        if dtype not in self._plain:
            b = products([b.T for b, _ in self.factors], dtype)
            self._plain[dtype] = Gram(b, products([a for _, a in self.factors], dtype), dtype)
        found = self._plain[dtype]
        if dtype == torch.float32 and not found.in_range():
            return None
        return found if self.weights is None else found.weighted(self.weights)

    @property
    def found(self) -> Gram | None:
        """The most precise Gram matrices of those found so far."""
        return self.at(max(self._plain, key=lambda dtype: dtype.itemsize)) if self._plain else None

    def any(self) -> Gram:
        """The most precise Gram matrices found so far; if none, those of fp32 where factors and range are fp32's."""
        narrow = self.at(torch.float32) if not self._plain and self.factors[0][0].dtype == torch.float32 else None
        return self.found or narrow or self.wide()

    def wide(self) -> Gram:
        """The Gram matrices in float64."""
        found = self.at(torch.float64)
        assert found is not None
        return found


class Leading(NamedTuple):
    """The leading singular triplets `U` (out, k), `s` (k,) descending and `V` (in, k), and the whole squared norm."""

    U: Tensor
    s: Tensor
    V: Tensor
    total: float


def leading(B: Tensor, A: Tensor, grams: Grams, k: int) -> Leading | None:
    """The k leading singular triplets of B A, fp32, from its Gram matrices; None where rounding leaves a doubt.

    First in fp32, then in float64. The projection on the directions found is exact, so that what it keeps of the
    energy is known, and the eigenvalues tell what any k directions can keep: the error is within 1.001 of the least
    possible one or at the level of fp32's rounding, and the share kept is right to 1e-5.
    """
    known = grams.any()
    found = _leading(B, A, known, k)
    return found if found or known.dtype == torch.float64 else _leading(B, A, grams.wide(), k)


def _leading(B: Tensor, A: Tensor, gram: Gram, k: int) -> Leading | None:
    if A.shape[1] > B.shape[0]:
        # The directions of the shorter side cost less.
        turned = _leading(A.T, B.T, gram.turned(), k)
        return turned and Leading(turned.V, turned.s, turned.U, turned.total)
    unit, narrow = _ROUNDINGS * torch.finfo(gram.dtype).eps, 16 * torch.finfo(B.dtype).eps
    total = float(gram.products.sum())
    if not (total > 0 and unit * _spread(gram) <= _MEASURED * total):
        return None
    # With terms of equal halves, and 1 at most, no precision is lost to how A and B are scaled.
    d = torch.where(gram.terms > 0, gram.a.diagonal() / gram.b.diagonal(), 1).pow(0.25)
    size = float(gram.terms.max().sqrt())
    b, a = (d[:, None] * gram.b).mul_(d / size), (gram.a / d[:, None]).div_(d * size)
    # B diag(d) = Q Lᵀ with orthonormal Q: its product with diag(1/d) A has right singular vectors Aᵀ (L z / d).
    b.diagonal().add_(unit * len(d) ** 0.5)
    L, failed = torch.linalg.cholesky_ex(b)
    if failed:
        return None
    narrow_L = L.to(gram.dtype)
    values, z = torch.linalg.eigh(narrow_L.T @ a.to(gram.dtype) @ narrow_L)
    values, z = values[-k:].double().clamp(min=0), z[:, -k:]
    clear = values > unit * len(d) ** 0.5 * values[-1]
    values = values * size**2
    mixing = (narrow_L @ z[:, clear]).double() / d[:, None] / (values[clear] / size).sqrt()
    dtype, B, A = B.dtype, B.to(gram.dtype), A.to(gram.dtype)
    V = _orthonormal(A.T @ mixing.to(gram.dtype))
    image = B @ (A @ V)  # (out, k)
    squares, turn = torch.linalg.eigh(image.T.double() @ image.double())
    s, turn = squares.clamp(min=0).sqrt().flip(0), turn.flip(1).to(gram.dtype)
    kept = float(squares.sum())
    doubt = k * unit * size**2 * float(a.norm() * b.norm()) + abs(float(values.sum()) - kept)
    if not doubt <= max(_EXCESS * (total - kept), narrow**2 * total):
        return None
    # To tell what is rounding noise of the factors takes singular values that are known to that level.
    if unit**0.5 > narrow and not (clear.all() and s[-1] > unit**0.5 * s[0]):
        return None
    U = image @ turn / torch.where(s > 0, s, 1).to(gram.dtype)
    return Leading(U.to(dtype), s.to(dtype), (V @ turn).to(dtype), total)


def _spread(gram: Gram) -> float:
    """The squared norm is a sum of products, of which many may cancel: the root of the sum of what rounding acts on."""
    b, a = gram.b.diagonal(), gram.a.diagonal()
    return float((a @ gram.b.square() @ a + b @ gram.a.square() @ b).sqrt())


def _orthonormal(V: Tensor) -> Tensor:
    """Columns that are nearly orthonormal, made so."""
    triangle = torch.linalg.cholesky_ex(V.T.double() @ V.double())[0]
    turned: Tensor = torch.linalg.solve_triangular(triangle, V.T.double(), upper=False).T
    return turned.to(V.dtype)


def products(stacks: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """X Xᵀ, (R, R) float64, of the rows of the stacks X_i (r_i, features): products in `dtype`, sums in float64."""
    rank, features = sum(len(one) for one in stacks), stacks[0].shape[1]
    step = max(_ROWS, rank // _SHARE)
    found = torch.zeros(rank, rank, dtype=torch.float64, device=stacks[0].device)
    for start in range(0, features, _FEATURES):
        x = torch.cat([one[:, start : start + _FEATURES] for one in stacks]).to(dtype)
        for row in range(0, rank, step):
            found[row : row + step, row:] += x[row : row + step] @ x[row:].T
    return found.triu() + found.triu(1).T
