"""Less memory for more time: a layer's values are computed again when its gradient is taken, and are not kept."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_cli.errors import Refused
from lora_cli.models.heap import given_back
from lora_cli.names import layer_of


@contextmanager
def recomputed(model: nn.Module) -> Iterator[None]:
    """While the block runs, a pass of `model` keeps the inputs of its layers alone, and freed memory is given back.

    Gradients are the same: random numbers are drawn again as they were. Source: arXiv 1604.06174.

    Raises:
        Refused: a model without numbered layers.
    """
    named = {name: layer_of(name) for name, _ in model.named_modules()}
    layers = [model.get_submodule(name) for name, layer in named.items() if layer is not None and not layer.place]
    if not layers:
        raise Refused(
            f"{type(model).__name__} has no numbered layers that could be computed again",
            hint="leave out --grad-checkpointing",
        )
    try:
        for layer in layers:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        with given_back():
            yield
    finally:
        for layer in layers:
            del layer.forward
