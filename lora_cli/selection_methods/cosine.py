"""Selection by direction in weight space."""

from collections.abc import Sequence

from lora_cli.formats.reader import OpenAdapter
from lora_cli.methods import method
from lora_cli.selection_methods._beside import sums


@method("weights")
def cosine(candidates: Sequence[OpenAdapter], target: OpenAdapter) -> list[float]:
    """Cosine between each adapter's whole update and the target's: Σ⟨ΔW_c, ΔW_t⟩ / (‖ΔW_c‖ ‖ΔW_t‖) over all modules.

    A module that one of the two lacks counts as zero there. It is computed from the factors, without dense matrices.

    Source: the "macro" cosine of arXiv 2602.12323.
    """
    return sums(candidates, target).ratios()
