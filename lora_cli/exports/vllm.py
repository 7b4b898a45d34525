"""vLLM, by the rules of 0.33.0: it reads ranks and alphas as PEFT does, up to a limit."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from lora_cli.exports import Server, named_path

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values of `max_lora_rank`."""


class Vllm(Server):
    """The vLLM server."""

    program = "vLLM"
    version = "0.33.0"
    highest_rank = RANKS[-1]

    def command(self, base: Sequence[str], folder: Path, rank: int) -> list[str]:
        return _serving(base, named_path(folder, "name", "path"), rank)

    def hub_line(self, base: Sequence[str], repo: str, rank: int) -> str:
        """The shell line that serves the adapter of a repository on the Hub; `base` are the words for the base."""
        return shlex.join(_serving(base, f"{repo.partition('/')[2]}={repo}", rank))


def max_lora_rank(rank: int) -> int:
    """The smallest `max_lora_rank` that is at least `rank`."""
    return next(accepted for accepted in RANKS if rank <= accepted)


def _serving(base: Sequence[str], adapter: str, rank: int) -> list[str]:
    serve = ["vllm", "serve", *base, "--enable-lora", "--max-lora-rank", str(max_lora_rank(rank))]
    return [*serve, "--lora-modules", adapter]


vllm = Vllm()
