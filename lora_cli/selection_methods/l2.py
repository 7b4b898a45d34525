"""Selection by distance in weight space."""

import math
from collections.abc import Sequence

from lora_cli.formats.reader import OpenAdapter
from lora_cli.methods import method
from lora_cli.selection_methods._beside import sums


@method("weights")
def l2(candidates: Sequence[OpenAdapter], target: OpenAdapter) -> list[float]:
    """Nearness to the target: −log(1 + ‖ΔW_c − ΔW_t‖²) over all modules, 0 for the target itself.

    A module that one of the two lacks counts as zero there. Unlike the cosines it depends on size: small updates come
    before large ones where none is near. ‖ΔW_c‖² + ‖ΔW_t‖² − 2⟨ΔW_c, ΔW_t⟩ comes from the factors, without dense
    matrices.

    Source: "l2" of arXiv 2602.12323.
    """
    found = sums(candidates, target)
    apart = [own - 2 * both for own, both in zip(found.candidates, found.products, strict=True)]
    return [-math.log1p(max(0.0, square + found.target)) for square in apart]
