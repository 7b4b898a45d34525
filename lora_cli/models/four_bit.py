"""A base whose linear layers are held in 4 bits, by bitsandbytes, as QLoRA holds them: arXiv 2305.14314.

Values are NF4 in blocks of 64 with a scale each, and the scales are quantised in turn, in 8 bits by blocks of 256. A
product is taken with the weights in the precision of the computation again. Embeddings, the output head, norms, fused
experts and layers whose inputs are no multiple of 64 stay in that precision.
"""

import importlib.metadata
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_cli.errors import Refused, UsageError
from lora_cli.formats.skeleton import Skeleton
from lora_cli.models.hf import hf

_BLOCK, _BLOCK_OF_SCALES = 64, 256
_TABLES = 4 * (16 + 256 + 1)
"""Bytes of a layer's two tables of values and of the mean of its scales."""


def version() -> str:
    """The version of bitsandbytes. UsageError, with the extra to install, if it is not here."""
    try:
        return importlib.metadata.version("bitsandbytes")
    except importlib.metadata.PackageNotFoundError:
        raise UsageError(
            "--dtype 4bit needs bitsandbytes", hint="pip install 'lora-cli[4bit]', or choose another --dtype"
        ) from None


def quantised(base: Skeleton) -> set[str]:
    """The linear layers that are held in 4 bits, by name.

    On a CPU bitsandbytes reads other values than it stored where a block of 64 goes over the end of a row.
    """
    return {name for name, (_, into) in base.layers.items() if name != base.head and into % _BLOCK == 0}


def quantisation(base: Skeleton, compute: torch.dtype) -> Any:
    """The configuration for transformers' loading."""
    return hf.BitsAndBytesConfig(
        load_in_4bit=True,
        llm_int8_skip_modules=sorted(set(base.layers) - quantised(base)),
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def is_four_bit(model: Any) -> bool:
    """Whether a loaded model has layers in 4 bits."""
    return bool(getattr(model, "is_loaded_in_4bit", False))


def keep_layout(model: nn.Module, named: str) -> None:
    """Keep the layers of a loaded model as they were quantised.

    On CPUs with AVX512-BF16 the first pass without gradients would rearrange them for good, round their scales to bf16,
    and later passes would have no gradients.

    Raises:
        Refused: a layer that bitsandbytes reads wrongly; see `quantised`.
    """
    for name, module in _layers(model):
        module.support_avx512bf16_for_cpu = False
        if module.weight.device.type == "cpu" and module.in_features % _BLOCK:
            raise Refused(
                f"{named}: {name} is stored in 4 bits with {module.in_features} inputs, no multiple of {_BLOCK}, "
                "which bitsandbytes reads wrongly on a CPU",
                hint="use a GPU, or the base that is not quantised",
            )


def quantise_without_data(model: Any, base: Skeleton, compute: torch.dtype) -> None:
    """Give a model on the meta device the layers that loading in 4 bits would, with the memory that they take."""
    quantiser = hf.quantizers.AutoHfQuantizer.from_config(quantisation(base, compute), pre_quantized=False)
    quantiser.preprocess_model(model, device_map=None)
    for _, module in _layers(model):
        module.forward = _Stand(module)


def held(model: nn.Module) -> int:
    """The bytes of the weights of a model on the meta device, those in 4 bits as they are once quantised."""
    small = {id(module.weight) for _, module in _layers(model)}
    return sum(
        packed(one.numel()) if id(one) in small else one.numel() * one.element_size() for one in model.parameters()
    )


def packed(numbers: int) -> int:
    """The bytes of a layer's weight of so many numbers."""
    blocks = math.ceil(numbers / _BLOCK)
    return math.ceil(numbers / 2) + blocks + 4 * math.ceil(blocks / _BLOCK_OF_SCALES) + _TABLES


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in model.named_modules() if type(module).__name__ == "Linear4bit")


class _Stand:
    """The pass of a layer in 4 bits: a whole weight in the precision of the input, for the time of each product."""

    def __init__(self, module: nn.Linear) -> None:
        self._shape, self._bias = module.weight.shape, module.bias

    def __call__(self, x: Tensor) -> Tensor:
        found: Tensor = _Product.apply(x, self._shape)  # type: ignore[no-untyped-call]
        return found if self._bias is None else found + self._bias


class _Product(torch.autograd.Function):
    """x Wᵀ with a W that is made for the product alone, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: torch.Size) -> Tensor:
        ctx.shape = shape
        return x @ x.new_empty(shape).T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ grad.new_empty(ctx.shape), None
