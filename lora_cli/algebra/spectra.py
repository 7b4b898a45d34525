"""Spectra of several updates at once: their directions side by side, joint bases, and the spaces that these span.

All in float64, whatever the factors are: squares of singular values, which are cheap to get, then resolve all that
float32 factors hold.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_cli.algebra.grams import products
from lora_cli.algebra.lowrank import LowRank, Spectrum, concat, svd
from lora_cli.algebra.updates import Updates

Inside = Callable[[Updates, Tensor], LowRank | Tensor]
"""The merge method that runs inside a space: (updates in the space, weights) → the merged update in the space."""

NOISE = 1e-5
"""Directions below this share of the strongest are rounding noise. That of float32 factors lies around 1e-6."""


def counted(updates: Updates, weights: Tensor) -> tuple[Updates, Tensor]:
    """The adapters whose weight is not zero, and their weights; all of them where every weight is zero."""
    places = weights.nonzero().flatten().tolist() or list(range(len(weights)))
    kept = replace(
        updates,
        items=tuple(updates.items[i] for i in places),
        keys=tuple(updates.keys[i] for i in places),
        scales=tuple(updates.scales[i] for i in places),
        inputs=tuple(updates.inputs[i] for i in places) if updates.inputs else (),
        whole=None,
    )
    return kept, weights[places]


def compact(update: LowRank, floor: float = 0.0) -> Spectrum:
    """The singular triplets of an update above `floor` and above the noise, float64: its numerical rank of them."""
    found = svd(update.to(torch.float64))
    k = int(((found.s > NOISE * found.s[:1]) & (found.s > floor)).sum())
    return Spectrum(found.U[:, :k], found.s[:k], found.V[:, :k])


def basis(X: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors Q (m, k) of X (m, R), strongest first, and coordinates C (k, R): X = Q C but for the noise.

    Signs are fixed: the entry of largest magnitude of each vector is positive. Vectors of equal singular values are
    one of many choices. By the eigenvectors of the smaller Gram matrix: O(mR · min(m, R)), at 14336 × 480 a third of
    the time of QR.
    """
    tall = X.shape[0] >= X.shape[1]
    e, W = _strongest(X.T if tall else X)
    Q = X @ (W * e.rsqrt()) if tall else W
    C = (W * e.sqrt()).T if tall else W.T @ X
    turn = signs(Q)
    return Q * turn, C * turn[:, None]


def polar(X: Tensor) -> Tensor:
    """The matrix nearest to X (m, R) with orthonormal columns, within the directions that X has: X (XᵀX)^-½, where
    directions at the level of noise have no share.

    Copies of a column share its direction instead of being torn into arbitrary ones. Where R exceeds m the rows come
    out orthonormal. O(mR · min(m, R)).
    """
    if X.shape[0] < X.shape[1]:
        return polar(X.T).T
    e, W = _strongest(X.T)
    return X @ ((W * e.rsqrt()) @ W.T)


def times_polar(Y: Tensor, X: Tensor) -> Tensor:
    """Y P(X)ᵀ, (k, m), with P the polar factor of X (m, R): for Y (k, R) of fewer rows than X has columns."""
    if X.shape[0] < X.shape[1]:
        e, W = _strongest(X)
        return Y @ X.T @ (W * e.rsqrt()) @ W.T
    e, W = _strongest(X.T)
    return Y @ (W * e.rsqrt()) @ W.T @ X.T


def signs(Q: Tensor) -> Tensor:
    """The sign (k,) of the entry of largest magnitude in each column of Q (m, k)."""
    return Q.gather(0, Q.abs().argmax(0, keepdim=True)).sign().squeeze(0)


@dataclass(frozen=True, slots=True, eq=False)
class Space:
    """The k × l space that n updates span: orthonormal U (out, k) and V (in, l); update i is U · items[i] · Vᵀ."""

    U: Tensor
    V: Tensor
    items: tuple[LowRank, ...]

    @classmethod
    def of(cls, spectra: Sequence[Spectrum]) -> "Space":
        """By the left singular vectors of the stacks [U_1√s_1, …] and [V_1√s_1, …]."""
        U, B = basis(torch.cat([one.U * one.s.sqrt() for one in spectra], dim=1))
        V, A = basis(torch.cat([one.V * one.s.sqrt() for one in spectra], dim=1))
        ranks = [one.s.numel() for one in spectra]
        return cls(
            U,
            V,
            tuple(LowRank(b, a.T) for b, a in zip(torch.split(B, ranks, 1), torch.split(A, ranks, 1), strict=True)),
        )

    def sum(self, weights: Sequence[float]) -> Spectrum:
        """The singular triplets above the noise of Σ w_i items[i], with U (k, ρ) and V (l, ρ) in this space. O(R³)."""
        u, s, vh = torch.linalg.svd(concat(self.items, weights).dense(), full_matrices=False)
        rank = int((s > NOISE * s[:1]).sum())
        return Spectrum(u[:, :rank], s[:rank], vh[:rank].T)

    def outside(self, found: Spectrum) -> LowRank:
        """U · found · Vᵀ as factors (out, ρ) and (ρ, in)."""
        return LowRank(self.U @ (found.U * found.s), (self.V @ found.V).T)


def merged_inside(
    inside: Inside, updates: Updates, weights: Tensor, items: Sequence[LowRank], U: Tensor, V: Tensor | None = None
) -> LowRank:
    """U · inside(items) · Vᵀ in the dtype of the updates, of rank k; zero in a space without size.

    Args:
        inside: the method that merges the items.
        updates: the updates of which `items` (k, l) are the images.
        U: (out, k).
        V: (in, l); None where l is `in`.
    """
    first = updates[0]
    if 0 in items[0].shape:
        return LowRank(first.B[:, :0], first.A[:0])
    merged = inside(updates.moved(item.to(first.B.dtype) for item in items), weights)
    image = merged if isinstance(merged, Tensor) else merged.dense()
    return LowRank(U.to(image.dtype), image if V is None else image @ V.T.to(image.dtype))


def _strongest(X: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (k,) and eigenvectors (R, k) of X Xᵀ, X (R, m), above the noise, largest first."""
    e, W = torch.linalg.eigh(products([X], X.dtype))
    kept = e > NOISE**2 * e[-1:]
    return e[kept].flip(0), W[:, kept].flip(1)
