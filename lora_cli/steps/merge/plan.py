"""The plan of a merge, decided and checked before any weight is read."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from msgspec.structs import replace as replace_options
from torch import Tensor

from lora_cli.algebra.lowrank import RankChoice
from lora_cli.errors import Refused, UsageError
from lora_cli.exports import Server, Shape, server
from lora_cli.formats.factors import TAKE_THE_UPDATE
from lora_cli.formats.facts import TASKS_WITH_A_HEAD
from lora_cli.formats.layout import Layout, layout
from lora_cli.formats.reader import OpenAdapter, demand_same_shapes, shapes_of
from lora_cli.formats.skeleton import OWN, Skeleton, Spelling
from lora_cli.merge_options import METHODS, MergeOptions
from lora_cli.names import parent
from lora_cli.records import Coefficients
from lora_cli.steps.merge.scope import is_number, modules_in_scope, modules_meant
from lora_cli.steps.pool.licences import Stated

AUTO_RANK = 64
_LARGEST_FACTOR = 1e9

Inputs = Callable[[OpenAdapter, str], Tensor]
"""Called as inputs(adapter, module): a sample of the module's activations with the adapter applied, (tokens, in)."""


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """A merge that passed every check which needs no weights.

    `adapters` and `weights` are in canonical order, and in the order given only if the method is `ordered`. `options`
    hold all knobs of the method.
    `coefficients`, if given, replace the weights: per adapter, or per rank of each adapter, module by module. `zeros`
    are the shapes (out, in) of modules that the result holds as zeros, because the program of --for cannot load the
    others without them. `terms` maps each `id@commit`, and "" for the base, to what its card states.
    """

    adapters: tuple[OpenAdapter, ...]
    weights: tuple[float, ...]
    options: MergeOptions
    base: str
    modules: tuple[str, ...]
    coefficients: Coefficients | None = None
    inputs: Inputs | None = None
    zeros: Mapping[str, Shape] = field(default_factory=dict)
    skeleton: Skeleton | None = None
    terms: Mapping[str, Stated] = field(default_factory=dict)

    @cached_property
    def layout(self) -> Layout:
        """The layout of the result's factors."""
        parents = {module: factors for adapter in self.adapters for module, factors in adapter.modules.items()}
        modules = {module: parents[module] for module in self.modules}
        own = layout(modules, self.skeleton, known=shapes_of(self.adapters), zeros=self.zeros)
        return own.spelled(self.spelling)

    @property
    def spelling(self) -> Spelling:
        """The names in the result: those of the class that all adapters were trained on, else the base's."""
        found = {adapter.spelling for adapter in self.adapters}
        return found.pop() if len(found) == 1 else OWN

    @property
    def written(self) -> tuple[str, ...]:
        """Every module of the result."""
        return tuple(self.layout.of)

    @property
    def targets(self) -> dict[str, list[str]]:
        """The result's modules as a PEFT configuration names them."""
        # Another class may have more modules of these last names than the base's class.
        known = self.skeleton if self.spelling == OWN else None
        return self.layout.targets(modules_meant(self.layout.layers, self.adapters, known))

    @cached_property
    def saved(self) -> OpenAdapter | None:
        """The adapter whose wholly saved modules go into the result, None if there is none."""
        return next((adapter for adapter in self.adapters if adapter.ref.pinned == self.options.saved_modules), None)

    @property
    def target(self) -> Server | None:
        """The program that the result is for, None if --for names none."""
        return _target(self.options)

    @cached_property
    def known(self) -> Mapping[str, Shape]:
        """(out, in) of every module that one of the adapters has, in the scope or not."""
        return shapes_of(self.adapters)

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the base stores its weights (in, out). PEFT saves true if the base does; false is PEFT's default."""
        return any(adapter.fan_in_fan_out for adapter in self.adapters)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that decide the result besides the adapters themselves."""
        ordered = METHODS.get(self.options.method).ordered
        return {
            **self.options.settings,
            "base": self.base,
            "weights": {a.ref.pinned: w for a, w in zip(self.adapters, self.weights, strict=True)},
            "coefficients": None if self.coefficients is None else self.coefficients.sha256,
            **({"order": [adapter.ref.pinned for adapter in self.adapters]} if ordered else {}),
        }

    def rank_choice(self, ranks: Sequence[int]) -> RankChoice:
        """The rule for the rank of a module's result if its adapters have `ranks`."""
        choice = rank_choice(self.options.rank, self.options.energy, ranks)
        most = None if self.target is None else self.target.highest_rank
        if most is None or choice.exact:
            return choice
        return replace(choice, ceiling=min(choice.ceiling or most, most))


def plan(
    adapters: Sequence[OpenAdapter],
    weights: Sequence[float],
    options: MergeOptions,
    *,
    base: str,
    coefficients: Coefficients | None = None,
    inputs: Inputs | None = None,
    skeleton: Skeleton | None = None,
    terms: Mapping[str, Stated] | None = None,
) -> MergePlan:
    """Check everything that can be checked before a weight is read.

    Args:
        weights: one per adapter.
        base: the common base model of all adapters, in the form that the result will declare.
        inputs: the samples for a method that needs inputs.
        skeleton: the modules of the base, None if its class is not known.
        terms: what the cards of the adapters and of the base state.

    Raises:
        UsageError: an unknown method, knob, rank or scope.
        NothingMatched: no module in the scope.
        Refused: no base, shapes that contradict each other, an adapter given twice, or one that has no module in the
            scope, a device that lacks float64, or a result that the program of --for cannot serve.
    """
    options = checked_options(options)
    if not base:
        raise Refused("none of these adapters names its base model", hint="name it with --base")
    if METHODS.get(options.method).needs == "inputs" and inputs is None:
        raise UsageError(
            f"--method {options.method} needs examples, to record the activations of each module",
            hint="give --data FILE.jsonl",
        )
    _check_weights(weights, coefficients, options)
    order = [*range(len(adapters))]
    if not METHODS.get(options.method).ordered:
        order.sort(key=lambda i: (adapters[i].ref.commit, adapters[i].ref.id))
    ordered = tuple(adapters[i] for i in order)
    modules = modules_in_scope(ordered, options.scope)
    demand_same_shapes(ordered, modules)
    _check_saved_modules(ordered, modules, options.saved_modules, dense=options.dense)
    _check_rank(ordered, modules, options.rank)
    target = _target(options)
    if target is not None:
        conv1d = [adapter.ref.id for adapter in ordered if adapter.fan_in_fan_out]
        target.demand_servable(conv1d=conv1d, rank=_asked_rank(ordered, modules, options))
    return MergePlan(
        adapters=ordered,
        weights=tuple(float(weights[i]) for i in order),
        options=options,
        base=base,
        modules=modules,
        coefficients=coefficients,
        inputs=inputs,
        zeros={} if target is None else target.zeros(modules, shapes_of(ordered)),
        skeleton=skeleton,
        terms=terms or {},
    )


def _check_weights(weights: Sequence[float], coefficients: Coefficients | None, options: MergeOptions) -> None:
    if coefficients is not None and options.missing != "zero":
        raise UsageError("--missing cannot be combined with --coef")
    if coefficients is not None and options.knobs.get("per") == "adapter":
        raise UsageError("--per adapter cannot be combined with --coef, whose coefficients differ between modules")
    if not all(math.isfinite(weight) for weight in weights):
        raise UsageError("weights must be finite numbers")
    if options.missing == "renorm" and coefficients is None and cancel(weights):
        raise Refused("weights sum to zero, so --missing renorm has nothing to spread them by")


def checked_options(options: MergeOptions) -> MergeOptions:
    """`options` with every knob of the method: all that can be checked without adapters.

    Raises:
        UsageError: an unknown method or knob, a value out of its range, options that exclude each other.
        Refused: a device that lacks float64.
    """
    checked = METHODS.check(options.method, options.knobs)
    options = replace_options(options, knobs=checked)
    _demand_one_form(options)
    if METHODS.get(options.method).kind == "factors":
        if options.rank not in ("auto", "sum") or options.energy is not None:
            raise UsageError(
                f"--rank and --energy cannot be combined with --method {options.method}, which keeps all ranks",
                hint="use --method linear to reduce the rank",
            )
        options = replace_options(options, rank="sum")
    if options.device.startswith("mps"):
        raise Refused("a merge computes in float64, which Apple's GPUs do not have", hint="use --device cpu")
    if "inside" in checked and checked.get("per") == "adapter":
        raise UsageError(f"--per adapter cannot be used with --method {options.method}, which merges module by module")
    rank_choice(options.rank, options.energy, [1])
    if options.lambda_ == 0:
        raise UsageError("--lambda 0 would erase the result: give a number other than 0")
    if not abs(options.lambda_) <= _LARGEST_FACTOR:
        raise UsageError(f"--lambda must be at most {_LARGEST_FACTOR:g} in size, not {options.lambda_:g}")
    return options


def _check_saved_modules(adapters: Sequence[OpenAdapter], modules: Sequence[str], what: str, *, dense: bool) -> None:
    """Refused if wholly saved modules are neither kept nor dropped, or if the chosen adapter has none to keep.

    Refused too if one of `modules` has an update and is saved whole: PEFT would leave out the update.
    """
    if what == "refuse":
        for adapter in adapters:
            if adapter.saved:
                raise Refused(f"{adapter.ref.id} holds modules saved whole", hint=TAKE_THE_UPDATE)
    elif what != "drop":
        if dense:
            raise UsageError("--dense cannot keep modules saved whole: use --saved-modules drop")
        chosen = next((adapter for adapter in adapters if adapter.ref.pinned == what), None)
        if chosen is None:
            raise UsageError(f"--saved-modules names {what!r}, which is not an adapter of this merge")
        if not chosen.saved:
            raise Refused(f"{chosen.ref.id} holds no modules saved whole", hint="--saved-modules drop")
        if not chosen.config.modules_to_save and chosen.config.task_type not in TASKS_WITH_A_HEAD:
            raise Refused(
                f"{chosen.ref.id}: its modules_to_save names none of the modules saved whole, so PEFT loads none",
                hint="--saved-modules drop",
            )
        _demand_apart(chosen, adapters, modules)


def _demand_apart(chosen: OpenAdapter, adapters: Sequence[OpenAdapter], modules: Sequence[str]) -> None:
    whole = {parent(name) for name in chosen.saved} | {*chosen.config.modules_to_save}
    for module in modules:
        if any(f".{one}." in f".{module}." for one in whole):
            other = next(adapter for adapter in adapters if module in adapter.modules)
            raise Refused(
                f"{module} is saved whole in {chosen.ref.id} and adapted by {other.ref.id}: PEFT applies only one",
                hint=f"leave {other.ref.id} out, or take the updates alone: --saved-modules drop",
            )


def _demand_one_form(options: MergeOptions) -> None:
    """UsageError for options that ask for two forms of result."""
    if options.dense and (options.rank != "auto" or options.energy is not None):
        raise UsageError("--rank and --energy cannot be combined with --dense, which keeps the full update")
    if options.dense and options.compact:
        raise UsageError("--compact cannot be combined with --dense, which writes no factors")
    if options.dense and options.for_:
        raise UsageError("--for cannot be combined with --dense, which writes no adapter")
    target = _target(options)
    if options.compact and target is not None and target.one_rank:
        raise UsageError(
            f"--compact cannot be combined with --for {options.for_}, which reads one rank for all modules"
        )


def _target(options: MergeOptions) -> Server | None:
    return None if options.for_ is None else server(options.for_)


def cancel(weights: Sequence[float]) -> bool:
    """True if the weights sum to zero, up to rounding."""
    return abs(sum(weights)) <= 1e-12 * sum(map(abs, weights))


def rank_choice(rank: str, energy: float | None, ranks: Sequence[int]) -> RankChoice:
    """The rule for the rank of a module's result if its adapters have `ranks`. UsageError for a wrong rank."""
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(f"--energy lies in 0 < energy <= 1, not {energy}")
    if rank == "sum":
        return RankChoice(ceiling=sum(ranks), energy=energy, exact=energy is None)
    if rank == "auto":
        return RankChoice(ceiling=max(AUTO_RANK, *ranks) if energy is None else None, energy=energy)
    if not is_number(rank) or int(rank) == 0:
        raise UsageError(f"--rank is a number above 0, sum or auto, not {rank!r}")
    return RankChoice(ceiling=int(rank), energy=energy)


def _check_rank(adapters: Sequence[OpenAdapter], modules: Sequence[str], rank: str) -> None:
    """Refuse a rank that no module can have: it would only pad every factor with zeros."""
    shapes = [adapter.modules[module] for adapter in adapters for module in modules if module in adapter.modules]
    most = max(min(factors.out_features, factors.in_features) for factors in shapes)
    if rank.isdecimal() and int(rank) > most:
        raise Refused(
            f"--rank {rank} is too high: the largest module of these adapters allows rank {most}",
            hint="use --rank auto",
        )


def _asked_rank(adapters: Sequence[OpenAdapter], modules: Sequence[str], options: MergeOptions) -> int:
    """The highest rank that the options ask for; 0 if they set none."""
    if options.rank.isdecimal():
        return int(options.rank)
    if options.rank != "sum" or options.energy is not None:
        return 0
    return max(sum(a.modules[module].rank for a in adapters if module in a.modules) for module in modules)


def identical(adapters: Sequence[OpenAdapter], inputs: Mapping[str, str]) -> list[list[str]]:
    """The ids of adapters with the same bytes and scales, group by group.

    Args:
        inputs: `id@commit` → SHA-256 of the weights.
    """
    groups: dict[tuple[str, tuple[float, ...]], list[str]] = {}
    for adapter in adapters:
        content = inputs[adapter.ref.pinned], tuple(adapter.scales.values())
        groups.setdefault(content, []).append(adapter.ref.id)
    return [ids for ids in groups.values() if len(ids) > 1]
