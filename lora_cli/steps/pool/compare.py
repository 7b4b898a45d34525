"""How adapters relate: two of them module by module, or all pairs of many; near copies among them."""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lora_cli.algebra.lowrank import LowRank, Spectrum, inner
from lora_cli.algebra.pairs import all_pairs, cosines
from lora_cli.algebra.spectra import compact
from lora_cli.algebra.threads import one_thread_each
from lora_cli.errors import Refused, UsageError
from lora_cli.formats.reader import OpenAdapter, all_modules, demand_same_shapes
from lora_cli.records import Progress, silent
from lora_cli.steps.pool.clusters import Similarity

# A cosine computed in fp32 may fall short of 1 by this much.
_ROUNDING = 1e-6
# Products of two norms, squared and summed, stay within float64 up to here.
_LARGEST = 1e75


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One adapter's update in a module, the scale folded in; all zero and empty where it lacks the module.

    `spectrum` holds the singular values above rounding noise, largest first, so that its length is the numerical rank;
    `effective_rank` is exp of the entropy of the shares σ²/Σσ²; `stable_rank` is Σσ²/σ₁².
    """

    norm: float
    spectrum: tuple[float, ...]

    @property
    def rank(self) -> int:
        """Numerical rank."""
        return len(self.spectrum)

    @property
    def effective_rank(self) -> float:
        """The effective number of directions: exp of the entropy of their shares of the squared norm."""
        total = sum(self._squares)
        return math.exp(-sum(s / total * math.log(s / total) for s in self._squares)) if total else 0.0

    @property
    def stable_rank(self) -> float:
        """Squared norm over the squared norm of the strongest direction."""
        return sum(self._squares)

    @property
    def _squares(self) -> tuple[float, ...]:
        """Squared singular values beside the largest: none of them under- or overflows for the update's size."""
        return tuple((s / self.spectrum[0]) ** 2 for s in self.spectrum)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleDiff:
    """Two adapters in one module of shape (out, in).

    `cosine` is None where one of them changes nothing. `outputs` and `inputs` are the principal angles in degrees,
    smallest first, between the column spaces (which the updates write) and the row spaces (which they read).
    """

    module: str
    shape: tuple[int, int]
    one: Side
    other: Side
    product: float
    outputs: tuple[float, ...]
    inputs: tuple[float, ...]

    @property
    def cosine(self) -> float | None:
        """⟨ΔW, ΔW'⟩ / (‖ΔW‖ ‖ΔW'‖)."""
        return _cosine(self.product, self.one.norm, self.other.norm)


@dataclass(frozen=True, slots=True, kw_only=True)
class Diff:
    """Two adapters, module by module and as a whole."""

    modules: tuple[ModuleDiff, ...]

    @property
    def norms(self) -> tuple[float, float]:
        """Frobenius norms of the whole updates."""
        return math.hypot(*(m.one.norm for m in self.modules)), math.hypot(*(m.other.norm for m in self.modules))

    @property
    def cosine(self) -> float | None:
        """Cosine of the whole updates; a module that an adapter lacks counts as zero."""
        return _cosine(sum(m.product for m in self.modules), *self.norms)

    @property
    def chance(self) -> float:
        """Standard deviation of the cosine if all directions were random: √Σ ‖ΔW‖²‖ΔW'‖²/(out·in) over both norms.

        Real adapters of one base share directions, so that unrelated ones may lie further from zero than this.
        """
        one, other = self.norms
        if not (one and other):
            return 0.0
        return math.hypot(
            *(m.one.norm / one * (m.other.norm / other) / math.sqrt(m.shape[0] * m.shape[1]) for m in self.modules)
        )


def diff(one: OpenAdapter, other: OpenAdapter, progress: Progress = silent) -> Diff:
    """Compare two adapters in every module that one of them touches, in float64 on the factors.

    Raises:
        Refused: shapes that contradict each other, NaN or Inf, values too large to compute with.
    """
    modules = all_modules([one, other])
    demand_same_shapes([one, other], modules)
    with one_thread_each() as workers, ThreadPoolExecutor(workers) as pool:
        compared = pool.map(partial(_compare, one, other), modules)
        return Diff(modules=tuple(next(compared) for _ in _announced(modules, progress)))


def principal_angles(q: Tensor, p: Tensor) -> tuple[float, ...]:
    """Angles between the spans of two orthonormal bases (n, k) and (n, l): min(k, l) degrees, smallest first.

    Cosines are the singular values of qᵀp, sines those of p − q qᵀp. Sines resolve small angles, which cosines cannot
    (Björck and Golub 1973).
    """
    if q.shape[1] < p.shape[1]:
        q, p = p, q
    overlap = q.T @ p
    adjacent = torch.linalg.svdvals(overlap)
    opposite = torch.linalg.svdvals(p - q @ overlap).flip(0)
    return tuple(torch.rad2deg(torch.atan2(opposite, adjacent)).tolist())


def similarity(adapters: Sequence[OpenAdapter], progress: Progress = silent) -> Similarity:
    """Cosines of the whole updates of all pairs; a module that an adapter lacks counts as zero there.

    One module of all adapters is in memory at a time, with the buffers of pairs.all_pairs: N r (10 out + 6 in) bytes
    at most.
    The order of the adapters is kept and does not matter.

    Raises:
        Refused: shapes that contradict each other, NaN or Inf.
    """
    modules = all_modules(adapters)
    demand_same_shapes(adapters, modules)
    products = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
    with one_thread_each() as workers:
        for module in _announced(modules, progress):
            places = torch.tensor([i for i, adapter in enumerate(adapters) if module in adapter.modules])
            updates = [adapters[i].read(module) for i in places.tolist()]
            products[places[:, None], places] += all_pairs(updates, workers=workers)
    return Similarity(
        refs=tuple(adapter.ref for adapter in adapters),
        cosines=cosines(products).numpy(),
        norms=tuple(products.diag().sqrt().tolist()),
        modules=len(modules),
    )


def near_copies(
    adapters: Sequence[OpenAdapter], cosine: float, progress: Progress = silent
) -> list[tuple[OpenAdapter, OpenAdapter, float]]:
    """Which adapters to leave out as near copies of others: (kept, left out, their cosine), by the cosine of the whole.

    In the order of commits, then ids, each adapter is kept unless its cosine with one kept before reaches `cosine`; it
    is then named with the one it is most like. So the order of `adapters` does not matter, and of a chain in which only
    neighbours are near copies every other one stays.

    Raises:
        UsageError: `cosine` is not in 0 < cosine <= 1.
        Refused: shapes that contradict each other, NaN or Inf.
    """
    if not 0 < cosine <= 1:
        raise UsageError(f"--dedupe is a cosine in 0 < cosine <= 1, not {cosine}")
    ordered = sorted(adapters, key=lambda adapter: (adapter.ref.commit, adapter.ref.id))
    found = similarity(ordered, progress).cosines
    kept: list[int] = []
    copies = []
    for place, adapter in enumerate(ordered):
        nearest = max(kept, key=lambda other: float(found[place, other]), default=None)
        if nearest is not None and found[place, nearest] >= cosine - _ROUNDING:
            copies.append((ordered[nearest], adapter, float(found[place, nearest])))
        else:
            kept.append(place)
    return copies


def _compare(one: OpenAdapter, other: OpenAdapter, module: str) -> ModuleDiff:
    factors = one.modules.get(module) or other.modules[module]
    shape = factors.out_features, factors.in_features
    x, y = (_update(adapter, module, shape) for adapter in (one, other))
    first, second = compact(x), compact(y)
    return ModuleDiff(
        module=module,
        shape=shape,
        one=_side(x, first),
        other=_side(y, second),
        product=float(inner(x, y)),
        outputs=principal_angles(first.U, second.U),
        inputs=principal_angles(first.V, second.V),
    )


def _update(adapter: OpenAdapter, module: str, shape: tuple[int, int]) -> LowRank:
    if module in adapter.modules:
        update = adapter.read(module, torch.float64)
        if not float(update.norm()) < _LARGEST:
            raise Refused(f"{adapter.ref.id}: values of {module} are too large to compute with", hint="leave it out")
        return update
    return LowRank(torch.zeros(shape[0], 0, dtype=torch.float64), torch.zeros(0, shape[1], dtype=torch.float64))


def _side(update: LowRank, spectrum: Spectrum) -> Side:
    return Side(norm=float(update.norm()), spectrum=tuple(spectrum.s.tolist()))


def _cosine(product: float, *norms: float) -> float | None:
    return max(-1.0, min(1.0, product / norms[0] / norms[1])) if all(norms) else None


def _announced(modules: Sequence[str], progress: Progress) -> Iterator[str]:
    for done, module in enumerate(modules):
        progress("compare", done, len(modules))
        yield module
    progress("compare", len(modules), len(modules))
