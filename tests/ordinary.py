"""Adapters as ordinary training leaves them, made from random numbers, and a spike planted in one.

Ordinary ones differ in rank, scale, adapted modules, decay of their singular values, norms over the depth, and in each
of these from module to module; what real adapters show is in docs/benchmarks.md.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Factors = dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]  # module → (B, A)

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
FEED_FORWARD = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
SETS = (("self_attn.q_proj", "self_attn.v_proj"), ATTENTION, FEED_FORWARD, (*ATTENTION, *FEED_FORWARD))
LAYERS, WIDTH = 4, 32


def ordinary(seed: int, layers: int = LAYERS) -> Factors:
    """One adapter: module → (B, A), float64, the scale folded in."""
    rng = np.random.default_rng(seed)
    names = SETS[rng.integers(len(SETS))]
    rank = int(rng.choice([1, 2, 4, 8, 16, 32], p=[0.02, 0.03, 0.2, 0.4, 0.3, 0.05]))
    size, decay = np.exp(rng.normal(0, 1.5)), rng.uniform(0.3, 1.5)
    slope = rng.normal(0, 0.1)
    made = {}
    for layer in range(layers):
        for name in names:
            effect = 0.3 * (len(name) % 5)
            norm = size * np.exp(effect + slope * layer + rng.normal(0, 0.3))
            values = np.arange(1, rank + 1) ** -(decay + rng.normal(0, 0.2))
            b = rng.normal(size=(WIDTH, rank)) * (norm * values / np.linalg.norm(values))
            made[f"model.layers.{layer}.{name}"] = (b / WIDTH**0.5, rng.normal(size=(rank, WIDTH)) / WIDTH**0.5)
    return made


def spiked(factors: Factors, modules: Sequence[str], strength: float, *, seed: int, keep_norm: bool = False) -> Factors:
    """The adapter with a new direction in place of the weakest of each of `modules`, `strength` times its strongest.

    keep_norm: scale the module so that its norm stays.
    """
    rng = np.random.default_rng(seed)
    made = dict(factors)
    for module in modules:
        b, a = factors[module]
        U, s, Vt = np.linalg.svd(b @ a, full_matrices=False)
        rest = min(b.shape[1], len(s)) - 1
        u, v = rng.normal(size=len(b)), rng.normal(size=a.shape[1])
        spike = strength * s[0] * u / np.linalg.norm(u)
        new_b = np.column_stack([U[:, :rest] * s[:rest], spike])
        new_a = np.vstack([Vt[:rest], v / np.linalg.norm(v)])
        factor = np.linalg.norm(s) / np.linalg.norm(new_b @ new_a) if keep_norm else 1.0
        made[module] = (new_b * factor, new_a)
    return made
