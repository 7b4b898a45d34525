"""The adaptive layer: all adapters of a module as one concatenated low-rank path, with trainable coefficients.

y = W₀x + B̂ (c ∘ (Â x)), where Â (R, in) and B̂ (out, R) stack the frozen factors of all adapters (R = Σ rᵢ, scale folded
into B̂) and c = φ(θ) gives every rank its adapter's coefficient. Source: arXiv 2602.12323 and the methods it compares.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_cli.algebra.lowrank import LowRank
from lora_cli.errors import Refused
from lora_cli.formats.reader import OpenAdapter, all_modules
from lora_cli.formats.skeleton import Matrix
from lora_cli.models.apply import Factors, Term
from lora_cli.models.base_model import BaseModel
from lora_cli.records import Progress, patient, silent


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """The parameters θ of a mixture, and the way from them to coefficients.

    part: a module's name → the part of the model with which it shares its coefficients.
    per_rank: every rank of each adapter in each module has a coefficient of its own.
    start: θ at the start, (size,), from its size and a generator.
    coefficients: called as coefficients(θ, present), both (parts, adapters), or (size,) with `per_rank`; `present` is
        False where an adapter has no module in a part. Returns the coefficients in the same shape.
    """

    part: Callable[[str], str]
    start: Callable[[int, torch.Generator], Tensor]
    coefficients: Callable[[Tensor, Tensor], Tensor]
    per_rank: bool = False


class _Weighted(torch.autograd.Function):
    """y + B̂ (c ∘ (Â x)) for rows of tokens. Keeps only the (tokens, R) product, and no gradient for Â and B̂."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        hidden = x @ a.T  # (tokens, R)
        ctx.save_for_backward(hidden, a, b, c)
        return torch.addmm(y, hidden * c.to(hidden.dtype), b.T)  # (tokens, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, a, b, c = ctx.saved_tensors
        inner = grad @ b  # (tokens, R)
        for_x = (inner * c.to(inner.dtype)) @ a if ctx.needs_input_grad[1] else None
        return grad, for_x, None, None, (inner * hidden).sum(dim=0, dtype=c.dtype)


_weighted: Any = _Weighted.apply


@dataclass(frozen=True, slots=True, eq=False)
class _Block:
    """One module: Â (R, in), B̂ (out, R), and for each adapter that touches it (place, rank)."""

    a: Tensor
    b: Tensor
    parts: tuple[tuple[int, int], ...]


class Mixture:
    """All `adapters` side by side on one base, with coefficients to learn.

    Args:
        base: the model to which they are applied; factors are in its precision, on its device.
        adapters: of any ranks and target modules; an adapter that lacks a module counts as zero there.
        parameters: those that a fit method chose.
        seed: the seed of a random start.
        reinit: replace the factors of all adapters from place `kept` on by noise of the same spread, as a control for
            their content. Normal, mean 0, with the deviation of the module's stacked A and B.
        kept: the number of leading adapters that keep their factors under `reinit`.

    Raises:
        Refused: an adapter does not fit the base, or its values do not fit the base's precision.
    """

    def __init__(
        self,
        base: BaseModel,
        adapters: Sequence[OpenAdapter],
        parameters: Parameters,
        *,
        seed: int = 0,
        reinit: bool = False,
        kept: int = 0,
        progress: Progress = silent,
    ) -> None:
        self.adapters = tuple(adapter.ref.pinned for adapter in adapters)
        self._parameters = parameters
        for adapter in adapters:
            base.check(
                {name: (module.out_features, module.in_features) for name, module in adapter.modules.items()},
                adapter.ref.id,
            )
        self._blocks: dict[str, _Block] = {}
        modules, report = all_modules(adapters), patient(progress)
        for done, module in enumerate(modules, 1):
            generator = torch.Generator().manual_seed(_seed_of(seed, module)) if reinit else None
            self._blocks[module] = _block(base, adapters, module, generator, kept)
            report("loading adapters", done, len(modules))
        self._lay_out(base.device, {module: _unit(base.skeleton.get(module), module) for module in self._blocks})
        generator = torch.Generator().manual_seed(_seed_of(seed, "coefficients"))
        self.theta = parameters.start(self._present.numel(), generator).to(base.device).requires_grad_()
        self._current: dict[str, Tensor] = {}

    def _lay_out(self, device: torch.device, units: Mapping[str, str]) -> None:
        """The place in θ of the coefficient of each rank of each module; `units` maps matrices to their module."""
        n, per_rank = len(self.adapters), self._parameters.per_rank
        keys = {module: self._parameters.part(unit) for module, unit in units.items()}
        groups = {key: place for place, key in enumerate(dict.fromkeys(keys.values()))}
        present = torch.zeros(len(groups), n, dtype=torch.bool)
        index: list[Tensor] = []
        used = 0
        for module, block in self._blocks.items():
            width = block.a.shape[0]
            if per_rank:
                index.append(torch.arange(used, used + width))
                used += width
                continue
            row = groups[keys[module]]
            owners = torch.tensor([place for place, _ in block.parts])
            present[row, owners] = True
            index.append((row * n + owners).repeat_interleave(torch.tensor([rank for _, rank in block.parts])))
        self._widths = [block.a.shape[0] for block in self._blocks.values()]
        self._index = torch.cat(index).to(device)
        self._present = (torch.ones(used, dtype=torch.bool) if per_rank else present).to(device)
        self._groups = len(groups)

    def penalty(self) -> Tensor:
        """Mean over the groups of Σ|θ|, the term for an L1 factor."""
        return self.theta.abs()[self._present.flatten()].sum() / self._groups

    def _factors(self) -> Tensor:
        """One for every entry of θ, float32."""
        return self._parameters.coefficients(self.theta.view(self._present.shape), self._present).flatten()

    def _refresh(self) -> None:
        # Gather once for the whole model: a gather per module would cost more than a tiny module's product.
        spread = self._factors()[self._index].split_with_sizes(self._widths)
        self._current = dict(zip(self._blocks, spread, strict=True))

    def _factors_of(self, module: str) -> Factors:
        block = self._blocks[module]
        return lambda: (block.b * self._current[module].to(block.b.dtype), block.a)

    def _term(self, module: str) -> Term:
        block = self._blocks[module]

        def add(x: Tensor, y: Tensor) -> Tensor:
            rows, inputs = y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
            mixed: Tensor = _weighted(rows, inputs, block.a, block.b, self._current[module])
            return mixed.view(y.shape)

        return add

    @contextmanager
    def applied(self, base: BaseModel) -> Iterator[None]:
        """While the block runs, every pass of `base` includes the mixture with the current coefficients."""
        linear = [module for module in self._blocks if module in base.shapes]
        others = [module for module in self._blocks if module not in base.shapes]
        with base.attach(
            {module: self._factors_of(module) for module in others},
            {module: self._term(module) for module in linear},
            before=self._refresh,
        ):
            yield

    @torch.no_grad()
    def updates(self) -> dict[str, LowRank]:
        """The current mixture, one exact update per module, with the coefficients folded into B."""
        spread = self._factors()[self._index].split_with_sizes(self._widths)
        return {
            module: LowRank((block.b * factors.to(block.b)).cpu(), block.a.cpu())
            for (module, block), factors in zip(self._blocks.items(), spread, strict=True)
        }

    @torch.no_grad()
    def values(self) -> dict[str, tuple[tuple[float, ...], ...]]:
        """The final coefficients as in `Coefficients.values`: module → one tuple per adapter.

        A tuple holds one factor, or one per rank where each rank has its own; an adapter absent from a module has
        (0.0,), or () there.
        """
        spread = self._factors()[self._index].cpu().split_with_sizes(self._widths)
        found = {}
        for (module, block), factors in zip(self._blocks.items(), spread, strict=True):
            own: list[tuple[float, ...]] = [() if self._parameters.per_rank else (0.0,)] * len(self.adapters)
            for (place, _), part in zip(
                block.parts, factors.split_with_sizes([rank for _, rank in block.parts]), strict=True
            ):
                own[place] = tuple(part.tolist()) if self._parameters.per_rank else (float(part[0]),)
            found[module] = tuple(own)
        return found


def _block(
    base: BaseModel,
    adapters: Sequence[OpenAdapter],
    module: str,
    generator: torch.Generator | None,
    kept: int,
) -> _Block:
    parts = tuple((i, adapter.modules[module].rank) for i, adapter in enumerate(adapters) if module in adapter.modules)
    width = sum(rank for _, rank in parts)
    outputs, inputs = adapters[parts[0][0]].shape(module)
    a, b = torch.empty(width, inputs), torch.empty(outputs, width)
    at = first_drawn = 0
    for place, rank in parts:
        update = adapters[place].read(module)
        a[at : at + rank], b[:, at : at + rank] = update.A, update.B
        at += rank
        if place < kept:
            first_drawn = at
    if generator is not None and first_drawn < width:
        # Take the spread of the replaced adapters only: a kept one must not set the control's size.
        drawn_a, drawn_b = a[first_drawn:], b[:, first_drawn:]
        drawn_a.copy_(torch.randn(drawn_a.shape, generator=generator) * drawn_a.std())
        drawn_b.copy_(torch.randn(drawn_b.shape, generator=generator) * drawn_b.std())
    a, b = (factor.to(base.device, base.dtype) for factor in (a, b))
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise Refused(f"{module}: an adapter's values overflow {base.dtype_name}", hint="use --dtype bf16 or fp32")
    return _Block(a, b, parts)


def _unit(matrix: Matrix | None, module: str) -> str:
    """The parameter that holds the matrices of all experts; else the module itself."""
    return module if matrix is None or matrix.expert is None else matrix.parameter


def _seed_of(seed: int, what: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}\n{what}".encode()).digest()[:7], "big")
