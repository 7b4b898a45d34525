"""Selection by the modules whose updates agree in direction."""

from collections.abc import Sequence

from lora_cli.algebra.lowrank import LowRank
from lora_cli.formats.reader import OpenAdapter
from lora_cli.methods import method
from lora_cli.selection_methods._beside import product, sums


@method("weights")
def clamp_pm(candidates: Sequence[OpenAdapter], target: OpenAdapter) -> list[float]:
    """Cosine without the modules of opposite direction: Σ max(⟨ΔW_c, ΔW_t⟩, 0) / (‖ΔW_c‖ ‖ΔW_t‖) over modules.

    The norms are those of the whole updates. It is computed from the factors, without dense matrices.

    Source: "clamp_pm" of arXiv 2602.12323.
    """
    return sums(candidates, target, _positive).ratios()


def _positive(x: LowRank, y: LowRank) -> float:
    return max(0.0, product(x, y))
