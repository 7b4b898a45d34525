"""Selection by size."""

from collections.abc import Sequence

from lora_cli.methods import method


@method("catalogue")
def rank(rank_total: Sequence[int]) -> list[float]:
    """Sum of the ranks over all adapted modules: adapters of the largest capacity come first.

    Source: arXiv 2602.12323, where every adapter has one rank; the sum extends it to mixed ranks and modules.
    """
    return [*map(float, rank_total)]
