"""The steps of PEFT's combination types: each works on all A and on all B, never on the updates B·A."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lora_cli.algebra.draws import uniform
from lora_cli.algebra.lowrank import LowRank
from lora_cli.algebra.updates import Updates
from lora_cli.errors import Refused


def raw(updates: Updates, *, instead: str) -> list[LowRank]:
    """The factors as stored in their files, without the scale in B.

    Raises:
        Refused: ranks differ, so that entries do not correspond (the hint is the method `instead`); or a scale is 0,
            so that B cannot be recovered.
    """
    if len(ranks := sorted(set(updates.ranks))) > 1:
        raise Refused(
            f"PEFT adds A to A and B to B, so all ranks must be equal; here are {', '.join(map(str, ranks))}",
            hint=f"--method {instead} merges the updates themselves, of any ranks",
        )
    if 0 in updates.scales:
        raise Refused("PEFT adds B to B without its scale, which is 0 here, so B is not known", hint="leave it out")
    return [LowRank(u.B / s, u.A) for u, s in zip(updates, updates.scales, strict=True)]


def scaled(weights: Tensor, updates: Updates) -> Tensor:
    """Each adapter's w·s, (n,) float64: PEFT's factor on B·A."""
    return weights * torch.tensor(updates.scales, dtype=weights.dtype)


def trimmed(factors: Sequence[LowRank], density: float) -> list[LowRank]:
    """Each A and each B with only its ⌊density · size⌋ entries of largest magnitude."""
    return [LowRank(_largest(f.B, density), _largest(f.A, density)) for f in factors]


def dropped(factors: Sequence[LowRank], keys: Sequence[int], density: float, seed: int) -> list[LowRank]:
    """Each A and each B with a random share `density` of its entries, divided by `density`.

    An adapter's random numbers depend on its key: first those for A, then those for B, both row by row.
    """
    if density == 1:
        return list(factors)

    def kept(x: Tensor, key: int, start: int) -> Tensor:
        drawn = uniform(seed, key, start, x.numel(), x.device).view(x.shape)
        return torch.where(drawn < density, x / density, 0)

    return [LowRank(kept(f.B, key, f.A.numel()), kept(f.A, key, 0)) for f, key in zip(factors, keys, strict=True)]


def summed(factors: Sequence[LowRank], weights: Tensor) -> LowRank:
    """B = Σ √|w_i| B_i and A = Σ ±√|w_i| A_i with the sign of w_i."""
    return _by_side(factors, weights, lambda stack, w: (stack * w).sum(0))


def elected(factors: Sequence[LowRank], weights: Tensor, election: str) -> LowRank:
    """For each entry of B and of A, the mean of ±√|w_i| X_i over the adapters whose X_i has the elected sign.

    The vote is by X_i without weights; a vote of zero elects plus.
    """

    def elect(stack: Tensor, w: Tensor) -> Tensor:
        votes = stack if election == "total" else stack.sign()
        sign = torch.where(votes.sum(0) >= 0, 1, -1)
        agree = stack.sign() == sign
        return (stack * w * agree).sum(0) / agree.sum(0).clamp(min=1)

    return _by_side(factors, weights, elect)


def _by_side(factors: Sequence[LowRank], weights: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> LowRank:
    roots = weights.abs().sqrt()

    def side(parts: list[Tensor], w: Tensor) -> Tensor:
        return combine(torch.stack(parts), w.to(parts[0])[:, None, None])  # (n, rows, columns), (n, 1, 1)

    return LowRank(side([f.B for f in factors], roots), side([f.A for f in factors], torch.copysign(roots, weights)))


def _largest(x: Tensor, density: float) -> Tensor:
    if density == 1:
        return x
    # As in PEFT, keep exactly k; of equal magnitudes at the border, those that topk picks.
    places = torch.topk(x.abs().flatten(), int(density * x.numel())).indices
    mask = torch.zeros(x.numel(), dtype=torch.bool, device=x.device)
    mask[places] = True
    return torch.where(mask.view(x.shape), x, 0)
