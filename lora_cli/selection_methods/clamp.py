"""Selection by the entries of the updates that agree in sign."""

from collections.abc import Sequence

from lora_cli.algebra.overlap import agreeing
from lora_cli.formats.reader import OpenAdapter
from lora_cli.methods import method
from lora_cli.selection_methods._beside import sums


@method("weights")
def clamp(candidates: Sequence[OpenAdapter], target: OpenAdapter) -> list[float]:
    """Cosine without the entries of opposite signs: Σ max(ΔW_c ∘ ΔW_t, 0) / (‖ΔW_c‖ ‖ΔW_t‖) over all entries.

    0 where no entry agrees, 1 for multiples of the target. An unrelated adapter has about 1/π. It has no form in the
    factors: dense entries are formed a block of rows at a time.

    Source: "clamp" of arXiv 2602.12323.
    """
    return sums(candidates, target, agreeing).ratios()
