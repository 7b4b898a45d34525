"""Rows of different lengths in batches."""

from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor

from lora_cli.models.encode import Encoded


def by_length(lengths: Sequence[int], batch_size: int, kinds: Sequence[Hashable] = ()) -> Iterator[list[int]]:
    """Rows in batches, the longest first; only rows of one kind share a batch."""
    groups: dict[Hashable, list[int]] = {}
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        groups.setdefault(kinds[row] if kinds else None, []).append(row)
    for order in groups.values():
        for start in range(0, len(order), batch_size):
            yield order[start : start + batch_size]


def filled(batch: Sequence[Encoded], pad: int) -> Tensor:
    """(len(batch), longest) token ids. A causal model never looks right, so this needs no attention mask."""
    tokens = torch.full((len(batch), max(len(item.ids) for item in batch)), pad)
    for row, item in enumerate(batch):
        tokens[row, : len(item.ids)] = torch.tensor(item.ids)
    return tokens
