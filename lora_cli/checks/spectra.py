"""How an update spreads over its singular directions, module by module, from r × r Grams. numpy, not torch."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_cli.checks.weights import grams_of, stored_factors
from lora_cli.errors import Refused
from lora_cli.files import open_regular
from lora_cli.formats.facts import LoraConfigFacts
from lora_cli.formats.header import Header
from lora_cli.formats.modules import locate_modules
from lora_cli.formats.skeleton import Skeleton


class Spread(NamedTuple):
    """The update of one module: its Frobenius norm, and how its energy Σσ² spreads over the singular directions.

    `concentration` is the share σ₁²/Σσ² of the first direction. `entropy` is that of the shares over the logarithm of
    their number: 0 for one direction, 1 for equal ones; NaN at rank 1. Both are NaN for an update of zero.
    """

    norm: float
    concentration: float
    entropy: float


def spread_of(
    gram_b: NDArray[np.float64], gram_a: NDArray[np.float64], scale: float = 1.0, *, most: int
) -> list[Spread]:
    """The spread of each update scale · B·A, from BᵀB and AAᵀ, (n, r, r) float64.

    The eigenvalues of BᵀB·AAᵀ are the squared singular values; O(n r³). `most` is the smaller side of an update: no
    more directions than that can be there.
    """
    w, v = np.linalg.eigh(gram_a)
    root = v * np.sqrt(w.clip(min=0))[..., None, :]
    energies = np.linalg.eigvalsh(root.swapaxes(-1, -2) @ gram_b @ root)[:, -most:].clip(min=0)  # ascending
    total = energies.sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = energies / total[:, None]
        logs = np.log(shares, where=shares > 0, out=np.zeros_like(shares))
        entropy = -(shares * logs).sum(-1) / np.log(shares.shape[-1])
        norms = np.sqrt(total) * abs(scale)
    return [Spread(*map(float, one)) for one in zip(norms, shares[:, -1], np.abs(entropy), strict=True)]


def measure(path: Path, header: Header, config: LoraConfigFacts, skeleton: Skeleton | None = None) -> dict[str, Spread]:
    """The spread of every module of an adapter's file, by the base's names; of a fused one, those of its parts.

    Refused for NaN or Inf, and as `scan_weights` refuses.
    """
    located = locate_modules(config, header, skeleton)
    names: defaultdict[str, dict[int, str]] = defaultdict(dict)
    for module, factors in located.modules.items():
        for part in factors.parts:
            names[part.a.name][part.expert] = module if len(factors.parts) == 1 else part.module
    found: dict[str, Spread] = {}
    with open_regular(path) as file:
        for place, factors in stored_factors(located.modules.values()).items():
            grams = grams_of(file, factors)
            if grams is None:
                raise Refused(f"NaN or Inf in {factors.adapted}")
            scale = config.scale(factors.pattern, factors.rank)
            spreads = spread_of(grams.b, grams.a, scale, most=min(factors.out_features, factors.in_features))
            found.update({name: spreads[expert] for expert, name in names[place].items()})
    return found


AdapterSpread = Mapping[str, Spread]
"""The modules of an adapter with their spread."""
