"""The inner products of all pairs of many updates of one module, by tiles of Gram matrices; nothing dense is formed."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, combinations_with_replacement, groupby

import torch
from torch import Tensor

from lora_cli.algebra.lowrank import LowRank

# Rows of a tile, so that its products stay near the processor while they are summed.
_ROWS = 1024
# The largest standard deviation of a cosine from rounding; above it the pair is computed again in a wider precision.
# The worst of half a million pairs is then off by five times this, 1e-4.
_TOLERANCE = 2e-5
# The fewest entries of a module for which int8 is within the tolerance, for unrelated updates.
_MANY_ENTRIES = 2**21


def all_pairs(
    updates: Sequence[LowRank], *, workers: int = 1, precisions: Sequence[torch.dtype] | None = None
) -> Tensor:
    """⟨ΔW_i, ΔW_j⟩ of N updates of one shape, (N, N) float64, symmetric; exact squared norms on the diagonal.

    P1 in tiles of BᵀB ∘ AAᵀ, the quickest precision of the machine first. How far rounding moves a pair is estimated
    from what was summed for it; where that exceeds 2e-5 of ‖ΔW_i‖‖ΔW_j‖, as for near copies, related adapters and
    updates whose parts cancel, the pair is computed again in the next precision. So cosines are right to 1e-4,
    whatever they are. O(N² r² (out + in)); besides the updates a copy of their Bs and N r (out + in) numbers of the
    first precision are held.

    Args:
        workers: the number of threads, each on its own tiles; set torch's own threads to one.
        precisions: from narrow to wide; None takes what the processor multiplies natively of int8 (whole numbers per
            row, for large modules) and bfloat16, then fp32 and float64.
    """
    n = len(updates)
    products = torch.zeros(n, n, dtype=torch.float64)
    if n == 0:
        return products
    ladder = precisions or _precisions(updates[0])
    with ThreadPoolExecutor(workers) as pool:
        squares = torch.tensor([*pool.map(_square, updates)], dtype=torch.float64)
        norms = squares.sqrt()
        units = [update.scaled(1 / norm if norm else 0.0) for update, norm in zip(updates, norms.tolist(), strict=True)]
        tiles = _tiles(units)
        stacks = [*pool.map(_Stack.of, [units[tile] for tile in tiles], [ladder[0]] * len(tiles))]

        def fill(pair: tuple[int, int]) -> None:
            rows, columns = tiles[pair[0]], tiles[pair[1]]
            block, noise = stacks[pair[0]].products(stacks[pair[1]])
            for wide in ladder[1:]:
                if rows == columns:
                    noise.fill_diagonal_(0)
                _refine(block, noise, units[rows], units[columns], wide)
            products[rows, columns] = block

        for _ in pool.map(fill, combinations_with_replacement(range(len(tiles)), 2)):
            pass
    products = products.triu(1) * norms[:, None] * norms
    return products + products.T + squares.diag()


def cosines(products: Tensor) -> Tensor:
    """Cosines from all inner products, (N, N): within [-1, 1], 1 on the diagonal; a zero update has 0 throughout."""
    norms = products.diag().sqrt()
    found = (products / (norms[:, None] * norms)).nan_to_num(0, 0, 0).clamp(-1, 1)
    return found.fill_diagonal_(0) + (norms > 0).to(found).diag()


@dataclass(frozen=True, slots=True, eq=False)
class _Stack:
    """n updates side by side in one precision: `B` (R, out), `A` (R, in); int8 rows are in units of their own.

    `owner` (R, n) has, where a row is an update's, the product of the units of its two halves (1 in floating point).
    `longest` are the largest squared norms of a row of B and of A as they stand here.
    """

    B: Tensor
    A: Tensor
    owner: Tensor
    longest: tuple[float, float]

    @classmethod
    def of(cls, updates: Sequence[LowRank], dtype: torch.dtype) -> "_Stack":
        """The factors of `updates`, rounded to a precision."""
        b, a = torch.cat([u.B.T for u in updates]), torch.cat([u.A for u in updates])
        owner = torch.eye(len(updates), dtype=torch.promote_types(dtype, torch.float32), device=b.device)
        owner = owner.repeat_interleave(torch.tensor([u.rank for u in updates], device=b.device), dim=0)
        if dtype == torch.int8:
            b, a = b.float(), a.float()
            units = [rows.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127 for rows in (b, a)]
            b, a = (rows.div(unit).round_() for rows, unit in zip((b, a), units, strict=True))
            owner = owner * units[0] * units[1]
        longest = [
            float(torch.linalg.vector_norm(rows, dim=1).amax().square()) if len(rows) else 0.0 for rows in (b, a)
        ]
        return cls(b.to(dtype), a.to(dtype), owner, (longest[0], longest[1]))

    def products(self, other: "_Stack") -> tuple[Tensor, Tensor]:
        """The inner products with the updates of another stack, and the standard deviation rounding gave each."""
        b, a = _gram(self.B, other.B, self.owner.dtype), _gram(self.A, other.A, self.owner.dtype)  # (R, R')
        sums = self.owner.T @ (b * a) @ other.owner
        if self.B.dtype == torch.int8:
            # Every number is off by up to 1/2, with variance 1/12; a Gram entry by that times its rows' lengths.
            b_noise, a_noise = ((x + y) / 12 for x, y in zip(self.longest, other.longest, strict=True))
            spread = a.square_().mul_(b_noise).add_(b.square_(), alpha=a_noise)
        else:
            # One rounding is off by at most eps/2; four independent ones (two Grams) have a deviation of about eps/2.
            spread = b.mul_(a).mul_(torch.finfo(self.B.dtype).eps / 2).square_()
        noise = (self.owner.square().T @ spread @ other.owner.square()).sqrt()
        return sums.cpu().double(), noise.cpu().double()


def _refine(
    block: Tensor, noise: Tensor, rows: Sequence[LowRank], columns: Sequence[LowRank], dtype: torch.dtype
) -> None:
    """Compute again, in `dtype`, the smallest part of a tile that holds all pairs with too much rounding noise."""
    # `not (noise <= tol)` also catches NaN from overflow.
    doubtful = ~(noise <= _TOLERANCE)
    i, j = (doubtful.any(side).nonzero().flatten() for side in (1, 0))
    if len(i):
        some = _Stack.of([rows[place] for place in i.tolist()], dtype)
        others = _Stack.of([columns[place] for place in j.tolist()], dtype)
        block[i[:, None], j], noise[i[:, None], j] = some.products(others)


def _gram(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    # torch has no public product of int8 matrices with int32 sums: `@` of two int8 matrices overflows in int8.
    return (torch._int_mm(x, y.T) if x.dtype == torch.int8 else x @ y.T).to(dtype)


def _square(update: LowRank) -> float:
    b, a = update.B.double(), update.A.double()
    return max(0.0, float(((b.T @ b) * (a @ a.T)).sum()))


def _tiles(updates: Sequence[LowRank]) -> list[slice]:
    """The bounds of runs of updates with about _ROWS rows."""
    ends = accumulate(update.rank for update in updates)
    sizes = [len([*run]) for _, run in groupby(max(end - 1, 0) // _ROWS for end in ends)]
    return [slice(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]


def _precisions(update: LowRank) -> list[torch.dtype]:
    """The precisions that save time on this device for modules of this size, from narrow to wide."""
    out, inn = update.shape
    if update.B.device.type != "cpu":
        return [torch.float32, torch.float64]
    processor = torch.cpu.get_capabilities()
    if out * inn >= _MANY_ENTRIES and processor.get("avx512_vnni"):
        return [torch.int8, torch.float32, torch.float64]
    if processor.get("avx512_bf16"):
        return [torch.bfloat16, torch.float32, torch.float64]
    return [torch.float32, torch.float64]
