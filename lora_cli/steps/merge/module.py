"""One module of a merge: read its updates, run the method on them, bring the result to its rank."""

import hashlib
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from lora_cli.algebra.lowrank import LowRank, RankChoice, bound, gram, reduce, squared_norm
from lora_cli.algebra.threads import in_order, one_thread_each
from lora_cli.algebra.tiles import DeltaTiles, Part, exact_threshold
from lora_cli.algebra.updates import Updates
from lora_cli.errors import Refused
from lora_cli.formats.reader import HEADROOM, OpenAdapter
from lora_cli.merge_options import METHODS, MergeOptions
from lora_cli.records import Coefficients
from lora_cli.steps.merge.plan import MergePlan, cancel

# A squared norm below this fraction of the summed squares is rounding noise.
_CANCELLED = 1e-12
# A dense module of an 8B model takes a quarter of a gigabyte, and as much again while its rank is reduced.
_DENSE_AT_ONCE = 4
# Memory budget: a module in work needs about 12 times its factors in fp32; modules in flight share 4 GiB.
_FACTORS_HELD, _FACTORS_BYTES = 12, 4 << 30


class Effect:
    """Whether a merge has any effect: the norms of the adapters, and the norm that their sum could have had."""

    def __init__(self, adapters: Sequence[OpenAdapter]) -> None:
        self.squared = {adapter.ref.pinned: 0.0 for adapter in adapters}
        self.total = 0.0
        self.terms = 0.0

    def see(self, merged: "MergedModule") -> None:
        """Add one module's norms."""
        for pinned, squared in merged.squares.items():
            self.squared[pinned] += squared
        self.total += merged.made
        self.terms += merged.terms

    @property
    def cancelled(self) -> bool:
        """True if the result is only rounding noise."""
        return self.total <= _CANCELLED * self.terms

    def norm(self, adapter: OpenAdapter) -> float:
        """Frobenius norm of an adapter's update over the modules seen so far."""
        return math.sqrt(self.squared[adapter.ref.pinned])


@dataclass(frozen=True, slots=True, eq=False)
class MergedModule:
    """The result of one module.

    `update` is the final update; `total` and `kept` are its squared norms before and after the reduction. `made` is
    the squared norm of the method's result, `terms` the summed squares of its terms, `squares` the squared norms of
    the adapters' updates by `id@commit`.
    """

    update: LowRank | Tensor
    total: float
    kept: float
    made: float
    terms: float
    squares: Mapping[str, float]


class ModuleMerger:
    """Merges the modules of a plan, and holds the measures over all of them; `effect` is that of the modules so far."""

    def __init__(self, plan: MergePlan) -> None:
        self.plan = plan
        self.effect = Effect(plan.adapters)
        self._pinned = [*self.effect.squared]
        threads = torch.get_num_threads() if plan.options.device == "cpu" else 1
        self._workers = modules_at_once(plan.options, _largest_module(plan))
        self._tile_workers = threads // self._workers
        self._whole = _WholeAdapters(plan, threads)
        self._is_sum = METHODS.get(plan.options.method).kind == "coefficients"
        self._weighs_whole_adapters = self._is_sum and plan.options.knobs.get("per") == "adapter"

    def each(self) -> Generator[tuple[str, MergedModule], None, None]:
        """Every module with its result, in the plan's order. On a CPU several modules are merged at once.

        Each module runs on one thread: torch's own threads mostly wait for each other, above all on a busy machine.
        The result therefore does not depend on the number of threads.
        """
        work = self.merge_dense if self.plan.options.dense else self.merge
        for module, merged in self._in_order(work):
            self.effect.see(merged)
            yield module, merged

    def _in_order(self, work: Callable[[str], MergedModule]) -> Generator[tuple[str, MergedModule], None, None]:
        if self.plan.options.device != "cpu":
            yield from ((module, work(module)) for module in self.plan.modules)
            return
        with one_thread_each():
            calls = ((module,) for module in self.plan.modules)
            results = in_order(work, calls, self._workers, pending=self._workers)
            yield from zip(self.plan.modules, results, strict=True)

    def merge(self, module: str) -> MergedModule:
        """One module at the rank the plan asks for."""
        merged = self._merged(module)
        reduced = reduce(merged.update, self._choice(merged))
        return self._finished(merged, reduced.update, reduced.total, reduced.kept)

    def merge_dense(self, module: str) -> MergedModule:
        """One module as its whole update, (out, in)."""
        merged = self._merged(module)
        dense = merged.update if isinstance(merged.update, Tensor) else merged.update.dense()
        squared = squared_norm(dense)
        return self._finished(merged, dense, squared, squared)

    def _finished(self, merged: "_Merged", update: LowRank | Tensor, total: float, kept: float) -> MergedModule:
        factor = self.plan.options.lambda_ * (merged.norm_match(total) if self.plan.options.norm_match else 1.0)
        return MergedModule(
            update.mul_(factor) if isinstance(update, Tensor) else update.scaled(factor),
            total=total * factor**2,
            kept=kept * factor**2,
            made=total,
            terms=merged.terms,
            squares=dict(zip(merged.pinned, merged.squares.tolist(), strict=True)),
        )

    def _merged(self, module: str) -> "_Merged":
        plan = self.plan
        places = [i for i, adapter in enumerate(plan.adapters) if module in adapter.modules]
        adapters = [plan.adapters[i] for i in places]
        read = [_read(plan, i, module) for i in places]
        updates = Updates(
            tuple(update for update, _ in read),
            keys=tuple(_key(adapter, module) for adapter in adapters),
            scales=tuple(adapter.scales[module] for adapter in adapters),
            whole=self._whole.of(places),
            inputs=tuple(plan.inputs(a, module).to(plan.options.device) for a in adapters)
            if plan.inputs is not None
            else (),
            absent=self._absent(places),
        )
        weights = torch.tensor(self._weights(module, [weight for _, weight in read]), dtype=torch.float64)
        if self._is_sum and not updates.outgrown:
            updates.grams.any()  # their sum will need the Gram matrices
        squares = updates.squares()
        demand_room(module, float(weights.abs() @ squares.sqrt()))
        if self._weighs_whole_adapters:
            merged: LowRank | Tensor = updates.sum(weights * self._whole_factors[places])
        else:
            try:
                merged = run_method(
                    plan.options.method, updates, weights, plan.options.knobs, workers=self._tile_workers
                )
            except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
                raise Refused(f"{module}: {plan.options.method} failed numerically in this module ({error})") from error
        demand_room(module, bound(merged))
        pinned = [self._pinned[i] for i in places]
        return _Merged(merged, pinned, updates.ranks, squares, weights, sum(map(abs, updates.absent)))

    def _absent(self, places: Sequence[int]) -> tuple[float, ...]:
        """The weights of the adapters not at `places` that count as zero updates all the same."""
        if self.plan.options.missing != "zero" or self.plan.coefficients is not None:
            return ()
        return tuple(weight for i, weight in enumerate(self.plan.weights) if i not in places)

    @cached_property
    def _whole_factors(self) -> Tensor:
        """The factor on each weight from a method that weighs whole adapters, the same in every module, (n,)."""
        everyone = Updates((), (), (), whole=self._whole.of(range(len(self.plan.adapters))))
        weights = torch.tensor(self.plan.weights, dtype=torch.float64)
        found: Tensor = METHODS.load(self.plan.options.method)(everyone, weights, **self.plan.options.knobs)
        return torch.where(weights != 0, found / torch.where(weights != 0, weights, 1), 0)

    def _weights(self, module: str, weights: list[float]) -> list[float]:
        plan = self.plan
        if plan.options.missing == "zero" or plan.coefficients is not None:
            return weights
        if cancel(weights):
            raise Refused(f"{module}: the weights of the adapters that have it sum to zero", hint="use --missing zero")
        return [w * (sum(plan.weights) / sum(weights)) for w in weights]

    def _choice(self, merged: "_Merged") -> RankChoice:
        plan = self.plan
        # A single adapter is not reduced: it is returned unchanged.
        alone = isinstance(merged.update, LowRank) and len(merged.ranks) == 1
        choice = plan.rank_choice(merged.ranks)
        if (
            alone
            and plan.options.rank == "auto"
            and plan.options.energy is None
            and merged.ranks[0] <= (choice.ceiling or 0)
        ):
            return RankChoice(exact=True)
        return choice


def _largest_module(plan: MergePlan) -> int:
    """The numbers in all factors of the module with the most of them."""
    sizes = [
        sum((one.out_features + one.in_features) * one.rank for one in having)
        for module in plan.modules
        if (having := [adapter.modules[module] for adapter in plan.adapters if module in adapter.modules])
    ]
    return max(sizes)


def held_dense(options: MergeOptions) -> bool:
    """Whether a merge forms each module's whole update."""
    inside = options.knobs.get("inside", options.method)
    return options.dense or METHODS.get(inside).kind == "elementwise"


def modules_at_once(options: MergeOptions, numbers: int) -> int:
    """How many modules are in work at once, of which the largest has so many numbers in its factors."""
    if options.device != "cpu":
        return 1
    room = _DENSE_AT_ONCE if held_dense(options) else max(1, _FACTORS_BYTES // (numbers * 4 * _FACTORS_HELD))
    return min(torch.get_num_threads(), room)


@dataclass(frozen=True, slots=True, eq=False)
class _Merged:
    """A method's result in one module, and its inputs: ranks, squared norms (n,) and weights (n,) of the updates.

    `absent` is the sum of the sizes of the weights of adapters that count as zero here.
    """

    update: LowRank | Tensor
    pinned: list[str]
    ranks: list[int]
    squares: Tensor
    weights: Tensor
    absent: float

    @property
    def terms(self) -> float:
        """Summed squares of the terms. For a dense result an estimate: in some methods weights are only ratios."""
        if isinstance(self.update, LowRank):
            return self.update.terms()
        return float(self.weights.abs().clamp(max=1).square() @ self.squares)

    def norm_match(self, total: float) -> float:
        """The factor from the squared norm `total` to the weighted mean of the updates' norms; 1 for mere noise."""
        if total <= _CANCELLED * self.terms:
            return 1.0
        target = float(self.weights.abs() @ self.squares.sqrt() / (self.weights.abs().sum() + self.absent))
        return target / math.sqrt(total)


def demand_room(module: str, largest: float) -> None:
    """Refused if numbers of this size, or NaN, would overflow in the computations that follow."""
    if not largest <= torch.finfo(torch.float32).max / HEADROOM:
        raise Refused(f"{module}: the weighted updates are too large to compute with", hint="choose smaller weights")


def run_method(
    name: str, updates: Updates, weights: Tensor, knobs: Mapping[str, Any], *, workers: int = 1
) -> LowRank | Tensor:
    """The result of the merge method `name`: as factors, or dense (out, in) where it works element by element.

    Args:
        weights: (n,) float64.
        knobs: all knobs of the method and, if it runs another inside, of that one.
        workers: the number of blocks of a dense update in work at once; the result does not depend on it.
    """
    one, function = METHODS.get(name), METHODS.load(name)
    result: LowRank | Tensor
    match one.kind:
        case "elementwise":
            result = function(DeltaTiles(updates, workers=workers), weights, **knobs)
        case "coefficients":
            result = updates.sum(function(updates, weights, **knobs))
        case "space":
            own = {key: knobs[key] for key in one.knobs if key != "inside"}
            others = {key: value for key, value in knobs.items() if key not in one.knobs}
            result = function(updates, weights, partial(run_method, knobs["inside"], knobs=others), **own)
        case _:
            result = function(updates, weights, **knobs)
    return result


class _WholeAdapters:
    """Measures over all modules of the adapters of a plan, each computed once on first use."""

    def __init__(self, plan: MergePlan, workers: int) -> None:
        self._plan = plan
        self._workers = workers
        self._gram: Tensor | None = None
        self._thresholds: dict[float, Tensor] = {}
        self._first = Lock()

    def of(self, places: Sequence[int]) -> "_Whole":
        """The measures of the adapters at `places`."""
        return _Whole(self, list(places))

    def gram(self) -> Tensor:
        with self._first:
            if self._gram is None:
                n = len(self._plan.adapters)
                found = torch.zeros(n, n, dtype=torch.float64)
                with ThreadPoolExecutor(self._workers) as pool:
                    # Add in the order of the modules, not of completion: a sum of floats depends on the order.
                    for places, products in pool.map(self._products, self._plan.modules):
                        found[torch.tensor(places)[:, None], torch.tensor(places)] += products
                self._gram = found
            return self._gram

    def _products(self, module: str) -> tuple[list[int], Tensor]:
        """The adapters that have a module, and their inner products there."""
        places = [i for i, adapter in enumerate(self._plan.adapters) if module in adapter.modules]
        return places, gram([_read(self._plan, i, module)[0] for i in places])

    def thresholds(self, density: float) -> Tensor:
        with self._first:
            if density not in self._thresholds:
                parts = [self._parts(place) for place in range(len(self._plan.adapters))]
                found = [exact_threshold(one, density, self._workers) for one in parts]
                self._thresholds[density] = torch.tensor(found, dtype=torch.float64)
            return self._thresholds[density]

    def _parts(self, place: int) -> list[Part]:
        present = self._plan.adapters[place].modules
        modules = [module for module in self._plan.modules if module in present]
        return [
            Part((present[module].out_features, present[module].in_features), partial(self._update, place, module))
            for module in modules
        ]

    def _update(self, place: int, module: str) -> LowRank:
        return _read(self._plan, place, module)[0]


@dataclass(frozen=True, slots=True)
class _Whole:
    adapters: _WholeAdapters
    places: list[int]

    def gram(self) -> Tensor:
        return self.adapters.gram()[self.places][:, self.places]

    def thresholds(self, density: float) -> Tensor:
        return self.adapters.thresholds(density)[self.places]


def _read(plan: MergePlan, place: int, module: str) -> tuple[LowRank, float]:
    """One adapter's update in one module on the plan's device, coefficients per rank folded in, and its weight."""
    adapter = plan.adapters[place]
    update = adapter.read(module).to(plan.options.device)
    if plan.coefficients is None:
        return update, plan.weights[place]
    return _with_coefficients(update, plan.coefficients, module, adapter)


def _with_coefficients(
    update: LowRank, coefficients: Coefficients, module: str, adapter: OpenAdapter
) -> tuple[LowRank, float]:
    values = coefficients.values[module][coefficients.adapters.index(adapter.ref.pinned)]
    if len(values) == 1:
        return update, values[0]
    return LowRank(update.B * update.B.new_tensor(values), update.A), 1.0


def _key(adapter: OpenAdapter, module: str) -> int:
    # A repository may hold several adapters at one commit, so the key includes the subfolder.
    text = f"{adapter.ref.commit}\n{adapter.ref.subfolder}\n{module}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
