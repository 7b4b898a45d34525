"""The embedded miniature world of `lora demo`: a trained base, a pool of trained adapters, tasks. No network.

Importing this package is cheap; the training runs in worker processes, which alone import torch, transformers and peft.
"""

from lora_cli.world.build import build, load
from lora_cli.world.layout import PoolAdapter, Size, Target, World

__all__ = ["PoolAdapter", "Size", "Target", "World", "build", "load"]
