"""RegMean: the update whose outputs are nearest to each adapter's own, on samples of each module's activations."""

from typing import Annotated

import torch
from torch import Tensor

from lora_cli.algebra.lowrank import LowRank
from lora_cli.algebra.updates import Updates
from lora_cli.errors import Refused
from lora_cli.methods import Knob, method

_FLOOR = 1e-6
_COLUMNS = 1024


@method("low-rank", needs="inputs")
def regmean(
    updates: Updates,
    weights: Tensor,
    *,
    alpha: Annotated[float, Knob("how much of the off-diagonal Gram entries to keep (1 = all)", low=0, below=1)] = 0.9,
) -> LowRank:
    """Least squares on the outputs: nearest to each adapter's outputs on its own inputs.

    From a sample X_i (t_i, in) of the module's activations with adapter i applied come G_i = X_iᵀX_i / t_i and, shrunk
    to its diagonal, G̃_i = |w_i| (α G_i + (1−α) diag G_i + ε I), each (in, in); then

        ΔW = (Σ sgn(w_i) ΔW_i G̃_i) (Σ G̃_i)⁻¹,

    with factors B̂ = [sgn(w_i) B_i] and Â = [A_i G̃_i (Σ G̃)⁻¹], rank Σ r_i. At α → 1 it minimises
    Σ |w_i| ‖(ΔW − ΔW_i) X_iᵀ‖² / t_i. ε is a millionth of the weighted mean of all diagonals: input features that are
    zero in all samples get the weighted average. Σ G̃ is a diagonal plus Σ t_i dyads: where these are fewer than `in`,
    its inverse comes from a system of that size (Woodbury) and nothing (in, in) is formed. Equal Grams give the
    weighted average; a single adapter comes back.

    Weights: factors on each adapter's data, as if its sample were repeated |w_i| times; a negative one flips the
    update's sign. Only their ratios matter. An adapter without the module has no inputs there and does not count,
    whatever --missing is. Weights that are all zero are refused.

    Cost: with T = Σ t_i and q = min(T, in): O(q T in + q³ + R T in), float64; T × T or in × in numbers in memory.

    Use: with examples of each adapter's own task (--data ADAPTER=FILE.jsonl). On the examples of one task (--data
    FILE.jsonl) the Grams are alike, and the result is close to the average. Thirty adapters at 256 tokens need a GPU: 3
    TFLOP in a module of 14336 inputs. The later reduction of the rank preserves the norm of the update, not of its
    outputs; --rank sum keeps every rank.

    Source: Jin et al. 2023, arXiv 2212.09849, on the updates alone: the shared base weights cancel. The paper's form
    is dense; the factored form, ε and the weights are ours.
    """
    if not weights.any():
        raise Refused("the weights are all zero, so no inputs count", hint="change the weights")
    samples = updates.inputs
    shares = (weights.abs() / weights.abs().sum()).tolist()
    counts = [share / len(x) for share, x in zip(shares, samples, strict=True)]
    diagonals = [x.double().square().sum(0) * c for x, c in zip(samples, counts, strict=True)]  # each (in,)
    floor = _FLOOR * float(sum(diagonals, torch.zeros_like(diagonals[0])).mean()) or 1.0
    rests = [(1 - alpha) * d + floor * share for d, share in zip(diagonals, shares, strict=True)]
    rest = torch.stack(rests).sum(0)  # the diagonal part of Σ G̃, (in,)
    rows = []
    for update, x, c, r in zip(updates, samples, counts, rests, strict=True):
        a, x = update.A.double(), x.double()
        rows.append(alpha * c * (a @ x.T) @ x + a * r)  # A_i G̃_i, (r_i, in)
    dyads = [(x, (alpha * c) ** 0.5) for x, c in zip(samples, counts, strict=True)]
    solved = _divided(torch.cat(rows), rest, dyads).to(updates[0].A)
    signs = weights.sign().tolist()
    return LowRank(torch.cat([u.B * sign for u, sign in zip(updates, signs, strict=True)], dim=1), solved)


def _divided(y: Tensor, rest: Tensor, dyads: list[tuple[Tensor, float]]) -> Tensor:
    """y (diag(rest) + UᵀU)⁻¹ for y (R, in), where the rows of U are those of each X, times its factor."""
    tokens, features = sum(len(x) for x, _ in dyads), len(rest)
    if tokens >= features:
        gram = torch.diag(rest)
        for x, factor in dyads:
            u = x.double() * factor
            gram.addmm_(u.T, u)
        return torch.cholesky_solve(y.T, torch.linalg.cholesky(gram)).T
    inner = torch.eye(tokens, dtype=y.dtype, device=y.device)
    seen = y.new_zeros(len(y), tokens)
    # In blocks of columns: the samples of many adapters, all at once in float64, would fill the memory.
    blocks = [slice(start, start + _COLUMNS) for start in range(0, features, _COLUMNS)]
    for block in blocks:
        u = _columns(dyads, block)
        inner.addmm_(u / rest[block], u.T)
        seen.addmm_(y[:, block] / rest[block], u.T)
    through = torch.cholesky_solve(seen.T, torch.linalg.cholesky(inner)).T  # (R, tokens)
    return torch.cat([(y[:, block] - through @ _columns(dyads, block)) / rest[block] for block in blocks], dim=1)


def _columns(dyads: list[tuple[Tensor, float]], block: slice) -> Tensor:
    """Some columns of U, (tokens, block)."""
    return torch.cat([x[:, block].double() * factor for x, factor in dyads])
