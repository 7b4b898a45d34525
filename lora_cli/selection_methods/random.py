"""Selection by chance: the control that every other selection has to beat."""

import hashlib
from collections.abc import Sequence

from lora_cli.methods import method
from lora_cli.records import Candidate


@method("catalogue")
def random(candidates: Sequence[Candidate], seed: int) -> list[float]:
    """Uniform in [0, 1), drawn from the seed and the adapter's own name: a growing pool keeps its earlier order.

    Source: the random pools of arXiv 2602.12323.
    """
    return [int(hashlib.sha256(f"{seed}:{a.pinned}".encode()).hexdigest()[:13], 16) / 16**13 for a in candidates]
