"""Selection by the entries that both updates change, in whatever direction."""

from collections.abc import Sequence

from lora_cli.algebra.overlap import absolute
from lora_cli.formats.reader import OpenAdapter
from lora_cli.methods import method
from lora_cli.selection_methods._beside import sums


@method("weights")
def abs(candidates: Sequence[OpenAdapter], target: OpenAdapter) -> list[float]:
    """Cosine of the magnitudes: Σ |ΔW_c ∘ ΔW_t| / (‖ΔW_c‖ ‖ΔW_t‖) over all entries.

    1 for multiples of the target, negative ones too. An unrelated adapter has about 2/π. It has no form in the factors:
    dense entries are formed a block of rows at a time.

    Source: "abs" of arXiv 2602.12323.
    """
    return sums(candidates, target, absolute).ratios()
