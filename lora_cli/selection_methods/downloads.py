"""Selection by popularity."""

from collections.abc import Sequence

from lora_cli.methods import method


@method("catalogue")
def downloads(downloads: Sequence[int], likes: Sequence[int]) -> list[float]:
    """Downloads, as counted by the Hub at the last sync; likes break ties."""
    most = max(likes, default=0) + 1
    return [loaded + liked / most for loaded, liked in zip(downloads, likes, strict=True)]
