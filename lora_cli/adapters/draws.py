"""Random numbers by place: the same whatever the order, the block size or the device they are drawn on."""

import hashlib

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def stream(seed: int, key: int) -> tuple[int, int]:
    """Two 32-bit words that stand for `seed` and an adapter's key in one module."""
    digest = hashlib.sha256(f"{seed}\n{key}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def uniform(seed: int, key: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """The numbers at places start … start + count - 1 of a stream, float32 in [0, 1), 24 bits each.

    A counter is mixed with the stream's two words by the 32-bit finaliser "lowbias32" (Wellons 2018), twice.
    """
    first, second = stream(seed, key)
    places = torch.arange(start, start + count, dtype=torch.int64, device=device)
    return (_mixed(_mixed(places ^ first) ^ second) >> 8).float() * 2.0**-24


def _mixed(x: Tensor) -> Tensor:
    x = x & _MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)
