"""How a PEFT folder names and arranges the factors of a result: the way back of `adapters.modules`."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from lora_cli.adapters.factors import PREFIX, AnyFactors, ModuleFactors
from lora_cli.adapters.modules import EXPERT_PARAMETERS, INNER
from lora_cli.adapters.skeleton import WEIGHT, Kind, Skeleton

Shape = tuple[int, int]

_EXPERT = re.compile(r"(.+\.experts)\.\d+\.([^.]+)")


class Place(NamedTuple):
    """The pair of tensors for one matrix, or for a stack of them: `modules` are then its experts, in order.

    `tensor` is the pair's name up to ".lora_", `target` the module or (`by_parameter`) the parameter that the
    configuration has to name. `kernel` is that of a convolution.
    """

    tensor: str
    modules: tuple[str, ...]
    target: str
    by_parameter: bool = False
    kind: Kind = "linear"
    kernel: tuple[int, ...] = ()

    @property
    def names(self) -> tuple[str, str]:
        """Names of the tensors A and B."""
        if self.kind == "embedding":
            return f"{self.tensor}.lora_embedding_A", f"{self.tensor}.lora_embedding_B"
        return f"{self.tensor}.lora_A{WEIGHT}", f"{self.tensor}.lora_B{WEIGHT}"


@dataclass(frozen=True)
class Layout:
    """Where the factors of a result go.

    `zeros` are modules, with their shapes (out, in), that PEFT needs beside the others: it fuses the factors of single
    experts and wants those of all of a layer. `singles` are all modules that it fuses so: they need one rank, the one
    that the configuration gives as r.
    """

    places: tuple[Place, ...]
    zeros: Mapping[str, Shape] = field(default_factory=dict)
    singles: frozenset[str] = frozenset()

    @cached_property
    def of(self) -> Mapping[str, Place]:
        """The place of each module."""
        return {module: place for place in self.places for module in place.modules}


def layout(modules: Mapping[str, AnyFactors], base: Skeleton | None, known: Mapping[str, Shape]) -> Layout:
    """The places of a result's modules.

    Args:
        modules: those of the result, each with the factors that a parent has there.
        base: what the base is made of, where that is known.
        known: shapes (out, in) of all modules that some parent adapts.
    """
    experts = {name: found for name in modules if (found := _expert(name, base)) is not None}
    single = all(_single(name, modules[name], base) for name in experts)
    singles = frozenset(experts) if single else frozenset()
    containers = {experts[name][0] for name in singles}
    zeros = {name: shape for name, shape in _beside(containers, base, known).items() if name not in singles}
    alone = {name: _alone(name, factors, base) for name, factors in modules.items() if name not in experts or single}
    zero_places = [Place(PREFIX + name, (name,), name) for name in zeros]
    stacks = {} if single else {name: modules[name] for name in experts}
    return Layout((*alone.values(), *zero_places, *_stacked(stacks, base)), zeros, singles | zeros.keys())


def _expert(name: str, base: Skeleton | None) -> tuple[str, str] | None:
    """(module that holds the stack, last name) of a matrix of one expert; None for any other."""
    if base is None:
        found = _EXPERT.fullmatch(name)
        return None if found is None else (found[1], found[2])
    matrix = base.get(name)
    if matrix is None or matrix.expert is None:
        return None
    return matrix.parameter.rpartition(".")[0], name.rpartition(".")[2]


def _single(name: str, factors: AnyFactors, base: Skeleton | None) -> bool:
    """Whether the factors are a single expert's own, under a name by which PEFT fuses them."""
    own = isinstance(factors, ModuleFactors) and factors.experts == 1
    return own and (base is None or name.rpartition(".")[2] in base.retargeted)


def _beside(containers: Iterable[str], base: Skeleton | None, known: Mapping[str, Shape]) -> dict[str, Shape]:
    """Every matrix that PEFT fuses with others in these modules, with its shape."""
    wanted = set(containers)
    if base is None:
        return {name: shape for name, shape in known.items() if (found := _expert(name, None)) and found[0] in wanted}
    names = [
        f"{container}.{expert}.{last}"
        for container in wanted
        for stack in base.below[container].values()
        for last in stack.parts
        for expert in range(stack.experts)
    ]
    return {name: matrix.shape for name in names if (matrix := base.get(name)) is not None}


def _alone(name: str, factors: AnyFactors, base: Skeleton | None) -> Place:
    """The place of a matrix that has a pair of tensors for itself."""
    matrix = None if base is None else base.get(name)
    if base is not None and matrix is not None and matrix.expert is None:
        # A target module of a retargeted name would be taken for a part of the experts.
        retargeted = matrix.kind == "linear" and name.rpartition(".")[2] in base.retargeted
        if matrix.kind == "parameter" or retargeted:
            return Place(PREFIX + name, (name,), matrix.parameter, by_parameter=True)
    return Place(PREFIX + name, (name,), name, kind=factors.kind, kernel=factors.kernel)


def _stacked(modules: Mapping[str, AnyFactors], base: Skeleton | None) -> list[Place]:
    """The places of stacks; in one module PEFT nests them, the one that is registered first innermost."""
    counts: dict[str, dict[str, int]] = {}
    for name, factors in modules.items():
        container, last = _expert(name, base) or ("", "")
        count = factors.parts[0].experts if base is None else base.below[container][last].experts
        counts.setdefault(container, {})[last] = count
    places = []
    for container, owned in counts.items():
        registered = EXPERT_PARAMETERS if base is None else base.below[container]
        for depth, last in enumerate(reversed([last for last in registered if last in owned])):
            members = tuple(f"{container}.{expert}.{last}" for expert in range(owned[last]))
            tensor = PREFIX + container + INNER * depth
            places.append(Place(tensor, members, f"{container}.{last}", by_parameter=True, kind="parameter"))
    return places
