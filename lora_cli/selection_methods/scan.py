"""Selection by fits over segments of a ranked list."""

from collections.abc import Sequence

from lora_cli.methods import method
from lora_cli.selection_methods._fits import Fits

_PARTS = 3


@method("fits")
def scan(fits: Fits) -> tuple[list[int], float]:
    """Validation loss of fits: the best set of those tried, from segments of a ranked list to single adapters.

    The list, in the order of `--rank-by`, is cut into segments of k adapters, and coefficients are fitted to the task
    over each, as `lora fit` does; the segment of the lowest validation loss is cut into three, and so on. From single
    adapters on, the best is joined by the next best as long as the loss falls. The set of the lowest loss of all fits
    is chosen, which may have fewer than k adapters. It takes about N/k + 3 log₃ k fits.

    Source: the segment scan of arXiv 2602.12323.
    """
    tried: dict[tuple[int, ...], float] = {}

    def best(sets: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        for one in sets:
            if one not in tried:
                tried[one] = fits.loss(one)
        return min(sets, key=tried.__getitem__)

    left, length = tuple(range(len(fits.names))), fits.most
    while True:
        segments = [left[start : start + length] for start in range(0, len(left), length)]
        together = best(segments)
        if length == 1:
            break
        left, length = together, -(-len(together) // _PARTS)
    for single in sorted(segments, key=tried.__getitem__)[1 : fits.most]:
        if best([together, together + single]) == together:
            break
        together += single
    chosen = min(tried, key=tried.__getitem__)
    return sorted(chosen), tried[chosen]
