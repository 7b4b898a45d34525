"""Selection by popularity."""

from collections.abc import Sequence

from lora_cli.methods import method
from lora_cli.records import Candidate


@method("catalogue")
def downloads(candidates: Sequence[Candidate], seed: int) -> list[float]:
    """Downloads, as counted by the Hub at the last sync; likes break ties."""
    most = max((a.likes for a in candidates), default=0) + 1
    return [a.downloads + a.likes / most for a in candidates]
