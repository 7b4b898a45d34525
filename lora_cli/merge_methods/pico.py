"""Pico: damp output directions that all adapters use, then merge."""

import torch
from torch import Tensor

from lora_cli.algebra.lowrank import LowRank, squared_norm
from lora_cli.algebra.spectra import Inside, basis, compact, counted
from lora_cli.algebra.updates import Updates
from lora_cli.methods import method

# A result below this fraction of its adapters' norm is rounding noise of adapters that cancel.
_NOISE = 1e-6


@method("space", inside=("linear", "ties", "tsv"))
def pico(updates: Updates, weights: Tensor, inside: Inside) -> LowRank | Tensor:
    """Damp the output directions that carry most of all adapters together, then merge by the method of --inside.

    With balanced factors ΔW_i = B_i A_i, B_i = U_i √S_i and A_i = √S_i V_iᵀ from its SVD, and
    [B_1, …, B_N] = U diag(σ) Wᵀ, direction j has the share p_j = σ_j² / Σ σ². Each B_i becomes U diag(a) Uᵀ B_i,
    a_j = 1 / (1 + (N − 1) p_j): a direction that holds everything is divided by N, a small one stays. The method inside
    merges the B_i A_i, and the result is scaled to the mean norm of the ΔW_i by |w_i|; a result of zero stays zero.
    Updates of zero count in that mean but not in N, and so do adapters without the module under --missing zero.

    Weights: shares; twice the weights give the same result.

    Cost: O(R² (out + in) + R³), float64, and the cost of the method inside; for ties that of ties on whole updates.

    Use: for adapters that share strong output directions. A single adapter comes back; copies come back with their
    strongest directions damped. Unrelated adapters share no strong direction: the result is then close to
    norm-matched.

    Source: Pico 2026, arXiv 2604.16826, from third-party code. That code uses the factors as trained and without
    alpha, so that a change of A and B that keeps ΔW changes the result; with balanced factors ΔW alone decides.
    """
    kept, w = counted(updates, weights)
    spectra = [compact(update) for update in kept]
    U, parts = basis(torch.cat([one.U * one.s.sqrt() for one in spectra], dim=1))
    energies = parts.square().sum(1) / parts.square().sum().clamp(min=torch.finfo(parts.dtype).tiny)
    others = max(0, sum(one.s.numel() > 0 for one in spectra) - 1)
    calmed = (U / (1 + others * energies)) @ parts
    stacks = torch.split(calmed, [one.s.numel() for one in spectra], dim=1)
    dtype = kept[0].B.dtype
    items = [LowRank(B, (one.V * one.s.sqrt()).T).to(dtype) for B, one in zip(stacks, spectra, strict=True)]
    shares = w / (float(w.abs().sum()) + sum(map(abs, kept.absent)) or 1)
    merged = inside(kept.moved(items), shares)
    return _of_norm(merged, float(shares.abs() @ torch.stack([one.s.norm().cpu() for one in spectra])))


def _of_norm(update: LowRank | Tensor, size: float) -> LowRank | Tensor:
    norm = squared_norm(update) ** 0.5 if isinstance(update, Tensor) else float(update.norm())
    factor = size / norm if norm > _NOISE * size else 1.0
    return update * factor if isinstance(update, Tensor) else update.scaled(factor)
