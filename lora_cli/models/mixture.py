"""The adaptive layer: all adapters of a module as one concatenated low-rank path, with trainable coefficients.

y = W₀x + B̂ (c ∘ (Â x)), where Â (R, in) and B̂ (out, R) stack the frozen factors of all adapters (R = Σ rᵢ, scale folded
into B̂) and c = φ(θ) gives every rank its adapter's coefficient. Source: arXiv 2602.12323 and the methods it compares.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_cli.algebra.lowrank import LowRank
from lora_cli.errors import Refused
from lora_cli.formats.reader import OpenAdapter, all_modules
from lora_cli.formats.skeleton import Matrix
from lora_cli.models.apply import Factors
from lora_cli.models.base_model import BaseModel
from lora_cli.models.concatenated import Block, added
from lora_cli.models.noise import Noise, drawn, seed_of
from lora_cli.records import Progress, patient, silent


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """The parameters θ of a mixture, and the way from them to coefficients.

    granularity, activation: their names in records.
    part: a module's name → the part of the model with which it shares its coefficients.
    per_rank: every rank of each adapter in each module has a coefficient of its own.
    absent: adapters count also in parts where they have no module, in `coefficients` and in the penalty.
    trained: the adapters' factors are learnt too, each beside its fixed scale.
    fresh: an adapter that is kept as the target gets new factors, A ~ N(0, 0.01²) and B = 0.
    start: θ at the start, (size,), from its size and a generator.
    coefficients: called as coefficients(θ, present), both (parts, adapters), or (size,) with `per_rank`; `present` is
        False where an adapter has no module in a part. Returns the coefficients in the same shape.
    """

    granularity: str
    activation: str
    part: Callable[[str], str]
    start: Callable[[int, torch.Generator], Tensor]
    coefficients: Callable[[Tensor, Tensor], Tensor]
    per_rank: bool = False
    absent: bool = False
    trained: bool = False
    fresh: bool = False


_FRESH = 0.01
"""The deviation of the A of an adapter whose factors are drawn anew; its B is 0."""


class Mixture:
    """All `adapters` side by side on one base, with coefficients to learn.

    Args:
        base: the model to which they are applied; factors are in its precision, on its device.
        adapters: of any ranks and target modules; an adapter that lacks a module counts as zero there.
        parameters: those that a fit method chose.
        seed: the seed of a random start.
        reinit: the noise that replaces the factors of all adapters from place `kept` on: a control for their content.
        kept: the number of leading adapters that are targets: they keep their factors under `reinit`.

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
        reinit: Noise | None = None,
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
        self._blocks: dict[str, Block] = {}
        modules, report = all_modules(adapters), patient(progress)
        for done, module in enumerate(modules, 1):
            updates = {place: one.read(module) for place, one in enumerate(adapters) if module in one.modules}
            if reinit is not None and (replaced := [place for place in updates if place >= kept]):
                scales = [adapters[place].scales[module] for place in replaced]
                generator = torch.Generator().manual_seed(seed_of(seed, module))
                noise = drawn(reinit, [updates[place] for place in replaced], scales, generator)
                updates |= dict(zip(replaced, noise, strict=True))
            if parameters.fresh:
                generator = torch.Generator().manual_seed(seed_of(seed, f"fresh {module}"))
                updates |= {place: _fresh(one, generator) for place, one in updates.items() if place < kept}
            own = {place: adapters[place].scales[module] for place in updates} if parameters.trained else None
            self._blocks[module] = _block(base, updates, module, own)
            report("loading adapters", done, len(modules))
        self._lay_out(base.device, {module: _unit(base.skeleton.get(module), module) for module in self._blocks})
        generator = torch.Generator().manual_seed(seed_of(seed, "coefficients"))
        self.theta = parameters.start(self._present.numel(), generator).to(base.device).requires_grad_()
        self._dtype = base.dtype
        self.tries_together = all(module in base.shapes and ".experts." not in module for module in self._blocks)
        """Whether a pass can try several θ: rows keep their places in it, as in linear layers outside of experts."""
        self._tried: Tensor | None = None
        self._candidates = self.theta.detach()[None]
        self._current: dict[str, Tensor] = {}

    @property
    def learnt(self) -> list[Tensor]:
        """The tensors to learn: θ, and the factors if they are learnt too."""
        blocks = self._blocks.values() if self._parameters.trained else ()
        return [self.theta, *(factor for block in blocks for factor in (block.a, block.b))]

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
        everywhere = present | self._parameters.absent
        self._present = (torch.ones(used, dtype=torch.bool) if per_rank else everywhere).to(device)
        self._groups = len(groups)

    def penalty(self) -> Tensor:
        """Mean over the groups of Σ|θ|, the term for an L1 factor."""
        return self.penalties(self.theta[None])[0]

    def penalties(self, thetas: Tensor) -> Tensor:
        """The `penalty` of each of several θ, (K, size) → (K,)."""
        return thetas.abs()[:, self._present.flatten()].sum(dim=1) / self._groups

    def _spread(self, theta: Tensor) -> Tensor:
        """The coefficient of each rank of each module, one module after another, float32."""
        return self._parameters.coefficients(theta.view(self._present.shape), self._present).flatten()[self._index]

    def _by_module(self, spread: Tensor) -> dict[str, Tensor]:
        return dict(zip(self._blocks, spread.split_with_sizes(self._widths, dim=-1), strict=True))

    def _refresh(self) -> None:
        # Gather once for the whole model: a gather per module would cost more than a tiny module's product.
        thetas = self.theta[None] if self._tried is None else self._tried
        spread = torch.stack([self._spread(theta) for theta in thetas])
        self._current = {
            module: _scaled(c, self._blocks[module].scale)
            for module, c in self._by_module(spread if len(spread) > 1 else spread[0]).items()
        }

    def _now(self, module: str) -> Tensor:
        return self._current[module]

    def _factors_of(self, module: str) -> Factors:
        block = self._blocks[module]
        return lambda: ((block.b * self._current[module].to(block.b.dtype)).to(self._dtype), block.a.to(self._dtype))

    @contextmanager
    def trying(self, thetas: Tensor) -> Iterator[None]:
        """While the block runs, a pass tries K of θ, (K, size), on one batch: copy k of the rows has `thetas[k]`.

        `arrange` gives the rows of the next passes to others of them.
        """
        self._tried = self._candidates = thetas
        try:
            yield
        finally:
            self._tried = None

    def arrange(self, owners: tuple[int, ...], rows: int, tokens: int) -> None:
        """The next pass has its rows in blocks of these θ, by place among those that are tried; see `Arranged`."""
        self._tried = self._candidates[list(owners)]

    @contextmanager
    def applied(self, base: BaseModel) -> Iterator[None]:
        """While the block runs, every pass of `base` includes the mixture with the current coefficients."""
        linear = [module for module in self._blocks if module in base.shapes]
        others = [module for module in self._blocks if module not in base.shapes]
        terms, weights = {}, {}
        for module in linear:
            now = functools.partial(self._now, module)
            terms[module], weights[module] = added(self._blocks[module], now, base.model.get_submodule(module))
        factors = {module: self._factors_of(module) for module in others}
        with base.attach(factors, terms, weights=weights, before=self._refresh):
            yield

    @torch.no_grad()
    def updates(self) -> dict[str, LowRank]:
        """The current mixture, one exact update per module, with the coefficients folded into B."""
        spread = self._by_module(self._spread(self.theta))
        return {
            module: LowRank((_scaled(block.b, block.scale) * spread[module].to(block.b)).cpu(), block.a.detach().cpu())
            for module, block in self._blocks.items()
        }

    @torch.no_grad()
    def factors(self) -> list[dict[str, LowRank]]:
        """The current factors of each adapter, by module, with the scale folded into B and without coefficients."""
        found: list[dict[str, LowRank]] = [{} for _ in self.adapters]
        for module, block in self._blocks.items():
            ranks = [rank for _, rank in block.parts]
            b = _scaled(block.b, block.scale).cpu().split_with_sizes(ranks, dim=1)
            a = block.a.detach().cpu().split_with_sizes(ranks)
            for (place, _), own_b, own_a in zip(block.parts, b, a, strict=True):
                found[place][module] = LowRank(own_b, own_a)
        return found

    @torch.no_grad()
    def values(self) -> dict[str, tuple[tuple[float, ...], ...]]:
        """The final coefficients as in `Coefficients.values`: module → one tuple per adapter.

        A tuple holds one factor, or one per rank where each rank has its own; an adapter absent from a module has
        (0.0,), or () there.
        """
        spread = self._by_module(self._spread(self.theta).cpu())
        found = {}
        for module, block in self._blocks.items():
            own: list[tuple[float, ...]] = [() if self._parameters.per_rank else (0.0,)] * len(self.adapters)
            for (place, _), part in zip(
                block.parts, spread[module].split_with_sizes([rank for _, rank in block.parts]), strict=True
            ):
                own[place] = tuple(part.tolist()) if self._parameters.per_rank else (float(part[0]),)
            found[module] = tuple(own)
        return found


def _fresh(update: LowRank, generator: torch.Generator) -> LowRank:
    """New factors in the shape of an update, which change nothing yet."""
    return LowRank(torch.zeros_like(update.B), _FRESH * torch.randn(update.A.shape, generator=generator))


def _block(base: BaseModel, updates: Mapping[int, LowRank], module: str, scales: Mapping[int, float] | None) -> Block:
    """One module's updates, by the place of their adapter, in the base's precision; with `scales` to be learnt."""
    a, b = torch.cat([one.A for one in updates.values()]), torch.cat([one.B for one in updates.values()], dim=1)
    parts = tuple((place, one.rank) for place, one in updates.items())
    used_a, used_b = (factor.to(base.device, base.dtype) for factor in (a, b))
    if not (torch.isfinite(used_a).all() and torch.isfinite(used_b).all()):
        raise Refused(f"{module}: an adapter's values overflow {base.dtype_name}", hint="use --dtype bf16 or fp32")
    if scales is None:
        return Block(used_a, used_b, parts)
    # Small steps would be lost in bf16.
    exact = torch.promote_types(base.dtype, torch.float32)
    scale = torch.cat([torch.full((rank,), scales[place]) for place, rank in parts])
    raw = torch.where(scale == 0, b, b / scale)
    a, b = (factor.to(base.device, exact).requires_grad_() for factor in (a, raw))
    return Block(a, b, parts, scale.to(base.device))


def _scaled(ranks: Tensor, scale: Tensor | None) -> Tensor:
    """(…, R) with the scale of each rank, if there is one."""
    return ranks if scale is None else ranks * scale


def _unit(matrix: Matrix | None, module: str) -> str:
    """The parameter that holds the matrices of all experts; else the module itself."""
    return module if matrix is None or matrix.expert is None else matrix.parameter
