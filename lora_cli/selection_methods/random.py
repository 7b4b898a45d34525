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
    drawn = (hashlib.sha256(f"{seed}:{a.pinned}".encode()).digest() for a in candidates)
    return [(int.from_bytes(digest[:7]) >> 4) / 2**52 for digest in drawn]
