"""Noise in place of adapters: the control that shows what a fit owes to their content."""

import hashlib
from collections.abc import Sequence
from typing import Literal

import torch

from lora_cli.algebra.lowrank import LowRank

Noise = Literal["norm", "pooled"]
"""norm: each adapter keeps the norm of its own update. pooled: the spread of all factors, then each adapter's scale."""


def drawn(
    kind: Noise, updates: Sequence[LowRank], scales: Sequence[float], generator: torch.Generator
) -> list[LowRank]:
    """Normal noise in the shapes of one module's updates, of mean 0.

    Args:
        kind: "norm", or "pooled": A and B have the standard deviations of all A and of all B before their scales, and
            each B is multiplied by its adapter's scale. Source of the second: the code beside arXiv 2602.12323.
        updates: of the adapters that have the module, scale folded into B.
        scales: their scales, alpha/rank or alpha/√rank.
    """
    noise = [
        LowRank(torch.randn(one.B.shape, generator=generator), torch.randn(one.A.shape, generator=generator))
        for one in updates
    ]
    if kind == "norm":
        # Half of the factor for each matrix: neither leaves the range of a 16-bit precision.
        roots = [float((one.norm() / other.norm()).sqrt()) for one, other in zip(updates, noise, strict=True)]
        return [LowRank(one.B * root, one.A * root) for one, root in zip(noise, roots, strict=True)]
    of_a = torch.cat([one.A.flatten() for one in updates]).std()
    of_b = torch.cat([(one.B / (scale or 1.0)).flatten() for one, scale in zip(updates, scales, strict=True)]).std()
    return [LowRank(one.B * (of_b * scale), one.A * of_a) for one, scale in zip(noise, scales, strict=True)]


def seed_of(seed: int, what: str) -> int:
    """The seed of one module's noise, or of something else that is called `what`."""
    return int.from_bytes(hashlib.sha256(f"{seed}\n{what}".encode()).digest()[:7], "big")
