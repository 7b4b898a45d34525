"""How many rows of a batch memory takes."""

import os
from typing import Any, NamedTuple

import torch

from lora_cli.models.base_model import BaseModel

TOKENS_PER_PASS = 4096
"""More tokens at once make no pass faster."""
MOST_ROWS = 1024
# The share of free memory that rows may take, and its size where it cannot be asked for.
_SHARE, _UNKNOWN = 0.25, 2**31


def free_memory(device: torch.device) -> int:
    """The bytes that are free on a device, 2 GiB where it does not say."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if device.type == "cpu" else _UNKNOWN
    except (ValueError, OSError):
        return _UNKNOWN


class Room:
    """The rows that a pass takes, and those that generation takes at once; both are halved when memory runs out.

    Args:
        longest: tokens of the longest row, with those still to be generated.
        judged: the most tokens of a row whose probabilities over the vocabulary are needed.
        limit: the most rows, None for as many as memory takes.
    """

    def __init__(self, base: BaseModel, *, longest: int, judged: int, limit: int | None = None) -> None:
        free = _SHARE * free_memory(base.device)
        one = row_bytes(base.model.config, base.dtype.itemsize, longest=longest, judged=judged)
        self._limit = limit or MOST_ROWS
        self._reading = max(1, min(self._limit, int(free / one.reading)))
        self.writing = max(1, min(self._limit, int(free / one.writing)))

    def reading(self, width: int, owners: int) -> int:
        """The rows of `width` tokens that one pass reads, as many of each of the `owners` if they are enough."""
        rows = max(1, min(self._reading, TOKENS_PER_PASS // width))
        return rows - rows % owners if rows > owners else rows

    def halve(self) -> bool:
        """Half the rows; False if there is nothing to halve."""
        if self._reading == self.writing == 1:
            return False
        self._reading, self.writing = max(1, self._reading // 2), max(1, self.writing // 2)
        return True


class RowBytes(NamedTuple):
    """The bytes of a row while it is read, and while it is written."""

    reading: int
    writing: int


def row_bytes(config: Any, size: int, *, longest: int, judged: int) -> RowBytes:
    """The memory of a row, by a configuration and the bytes of a number; `longest` and `judged` as in `Room`."""
    config = config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    of_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kept = longest * 2 * config.num_hidden_layers * heads * of_head * size
    widest = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    # Beside the keys and values: a layer's activations, the logits and their fp32 copies.
    reading = kept + longest * (8 * config.hidden_size + 4 * widest) * size + judged * config.vocab_size * (size + 8)
    # Rows that are gathered are there twice.
    return RowBytes(int(reading), int(2 * kept))
