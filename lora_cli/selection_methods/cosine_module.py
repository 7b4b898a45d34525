"""Selection by direction in weight space, every module alike."""

from collections.abc import Sequence

from lora_cli.formats.reader import OpenAdapter
from lora_cli.methods import method
from lora_cli.selection_methods._beside import beside, product, square


@method("weights")
def cosine_module(candidates: Sequence[OpenAdapter], target: OpenAdapter) -> list[float]:
    """Mean over modules of the cosine between an adapter's update and the target's: small modules count as large ones.

    The mean is over the modules that either has; a module that one of the two lacks, or that is zero in it, counts as
    0. It is computed from the factors, without dense matrices.

    Source: the "micro" cosine of arXiv 2602.12323, which adds 1e-6 to ‖ΔW_c‖² ‖ΔW_t‖² in every module and so favours
    adapters of large updates. Nothing is added here.
    """
    totals = [0.0] * len(candidates)
    for place, update, goal in beside(candidates, target):
        size = square(update) ** 0.5 * square(goal) ** 0.5 if goal is not None else 0.0
        if goal is not None and size:
            totals[place] += product(update, goal) / size
    counts = [len({*candidate.modules, *target.modules}) for candidate in candidates]
    return [total / count for total, count in zip(totals, counts, strict=True)]
