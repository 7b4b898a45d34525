"""One module of a mixture: the factors of all its adapters, concatenated, and the ways in which they reach an output.

y = W₀x + B̂ (c ∘ (Â x)) is taken by tokens through the factors, or by the weight W₀ + (B̂ ∘ c) Â that is made for a pass:
what takes fewer products.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_cli.models.apply import Term, Weight


class _Weighted(torch.autograd.Function):
    """Adds B̂ (c ∘ (Â x)) to y (…, out), in its place, for x (…, in).

    Keeps only the (tokens, R) product, and no gradient for Â and B̂.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        hidden = x.reshape(-1, x.shape[-1]) @ a.T  # (tokens, R)
        ctx.save_for_backward(hidden, a, b, c)
        y.view(-1, y.shape[-1]).addmm_(hidden * c.to(hidden.dtype), b.T)
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, a, b, c = ctx.saved_tensors
        inner = grad.reshape(-1, grad.shape[-1]) @ b  # (tokens, R)
        for_c = (inner * hidden).sum(dim=0, dtype=c.dtype)
        for_x = (inner * c.to(inner.dtype)) @ a if ctx.needs_input_grad[1] else None
        return grad, None if for_x is None else for_x.view(*grad.shape[:-1], -1), None, None, for_c


class _Merged(torch.autograd.Function):
    """W₀ + (B̂ ∘ c) Â, (out, in), with a gradient for c alone."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return torch.addmm(weight, b * c, a)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        return None, None, None, (grad @ a.T).mul_(b).sum(dim=0)


_weighted: Any = _Weighted.apply
_merged: Any = _Merged.apply


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """One module: Â (R, in), B̂ (out, R), and for each adapter that touches it (place, rank).

    `scale` (R,) stands beside factors that are learnt; in others it is folded into B̂.
    """

    a: Tensor
    b: Tensor
    parts: tuple[tuple[int, int], ...]
    scale: Tensor | None = None

    def takes_merged(self, tokens: int) -> bool:
        """Whether a step of so many tokens, forward and backward, takes fewer products with a weight made for it.

        Only in fp32 or more: a sum of weights in bf16 loses the update's last bits.
        """
        (width, into), out = self.a.shape, len(self.b)
        if self.scale is not None or self.a.dtype.itemsize < torch.float32.itemsize:
            return False
        return into * out * (tokens + 2 * width) < 2 * tokens * width * (into + out)


Coefficients = Callable[[], Tensor]
"""The coefficients of that moment: (R,), or (K, R) for K copies of the rows of tokens."""


def added(block: Block, coefficients: Coefficients, module: nn.Module) -> tuple[Term, Weight]:
    """How a linear layer's output gets the block's update: by a term for it, or by another weight for a pass."""
    plain = type(module).forward is nn.Linear.forward and module.weight.dtype == block.a.dtype

    def weight(x: Tensor) -> Tensor | None:
        c = coefficients()
        if not plain or c.dim() > 1 or not block.takes_merged(x.shape[:-1].numel()):
            return None
        made: Tensor = _merged(module.weight, block.a, block.b, c)
        return made

    def add(x: Tensor, y: Tensor) -> Tensor:
        c = coefficients()
        if c.dim() > 1:
            _tried(y.view(len(c), -1, y.shape[-1]), x.reshape(len(c), -1, x.shape[-1]), block, c)
            return y
        if block.scale is None:
            mixed: Tensor = _weighted(y, x, block.a, block.b, c)
            return mixed
        rows, inputs = y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
        a, b = block.a.to(inputs.dtype), block.b.to(inputs.dtype)
        return torch.addmm(rows, (inputs @ a.T) * c.to(inputs.dtype), b.T).view(y.shape)

    return add, weight


def _tried(y: Tensor, x: Tensor, block: Block, c: Tensor) -> None:
    """Adds B̂ (c_k ∘ (Â x)) to y in its place, for K copies of some tokens: y (K, tokens, out), x (K, tokens, in)."""
    (width, into), out, tokens = block.a.shape, len(block.b), x.shape[1]
    c = c[:, None].to(block.a.dtype)  # (K, 1, R)
    # Either K whole updates are made, or all tokens go through the factors: what takes fewer products.
    if into * out * (width + tokens) < tokens * width * (into + out):
        y.baddbmm_(x, ((block.b * c) @ block.a).mT)
    else:
        y.view(-1, out).addmm_((x @ block.a.T).mul_(c).flatten(0, 1), block.b.T)
