"""Random numbers by place: the same whatever the order, the block size or the device they are drawn on."""

import hashlib

import torch
from torch import Tensor

from lora_cli.algebra import kernels


def stream(seed: int, key: int) -> tuple[int, int]:
    """Two 32-bit words that stand for `seed` and an adapter's key in one module."""
    digest = hashlib.sha256(f"{seed}\n{key}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def uniform(seed: int, key: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """The numbers at places start … start + count - 1 of a stream, float32 in [0, 1), 24 bits each."""
    return kernels.uniform(*stream(seed, key), start, count, device)
