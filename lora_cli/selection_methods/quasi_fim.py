"""Selection by the entries that matter to both updates, by their squares."""

from collections.abc import Sequence

from lora_cli.algebra.lowrank import LowRank
from lora_cli.algebra.overlap import squares
from lora_cli.formats.reader import OpenAdapter
from lora_cli.methods import method
from lora_cli.selection_methods._beside import sums


@method("weights")
def quasi_fim(candidates: Sequence[OpenAdapter], target: OpenAdapter) -> list[float]:
    """Root of the cosine of squared entries: √(Σ ΔW_c² ∘ ΔW_t² / √(Σ ΔW_c⁴ · Σ ΔW_t⁴)) over all entries.

    The squares stand for the diagonal of a Fisher matrix. 1 for multiples of the target, negative ones too. Squares of
    low rank r are of rank r(r + 1)/2: from these factors where they are cheaper than dense entries, which are formed a
    block of rows at a time.

    Source: "quasi_fim" of arXiv 2602.12323.
    """
    return [ratio**0.5 for ratio in sums(candidates, target, squares, _fourth).ratios()]


def _fourth(update: LowRank) -> float:
    return squares(update, update)
