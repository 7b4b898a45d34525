"""Selection by chance: the control that every other selection has to beat."""

from collections.abc import Sequence
from hashlib import sha256

from lora_cli.methods import method


@method("catalogue")
def random(pinned: Sequence[str], seed: int) -> list[float]:
    """Uniform in [0, 1), drawn from the seed and the adapter's own name: a growing pool keeps its earlier order.

    Source: the random pools of arXiv 2602.12323.
    """
    return [(int.from_bytes(sha256(f"{seed}:{name}".encode()).digest()[:7]) >> 4) / 2**52 for name in pinned]
