"""Selection by direction in weight space."""

from collections.abc import Sequence

from lora_cli.algebra.lowrank import LowRank, inner
from lora_cli.formats.reader import OpenAdapter
from lora_cli.methods import method


@method("weights")
def cosine(candidates: Sequence[OpenAdapter], target: OpenAdapter) -> list[float]:
    """Cosine between each adapter's whole update and the target's: Σ⟨ΔW_c, ΔW_t⟩ / (‖ΔW_c‖ ‖ΔW_t‖) over all modules.

    A module that one of the two lacks counts as zero there. It is computed from the factors, without dense matrices.

    Source: the "macro" cosine of arXiv 2602.12323.
    """
    targets = {module: target.read(module) for module in target.modules}
    target_norm = _norm(list(targets.values()))
    scores = []
    for candidate in candidates:
        updates = {module: candidate.read(module) for module in candidate.modules}
        product = sum(float(inner(update, targets[m])) for m, update in updates.items() if m in targets)
        norm = _norm(list(updates.values())) * target_norm
        scores.append(product / norm if norm else 0.0)
    return scores


def _norm(updates: Sequence[LowRank]) -> float:
    return float(sum(float(inner(u, u)) for u in updates) ** 0.5)
