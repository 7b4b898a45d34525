"""The names and places of a result's factors in a PEFT folder: the inverse of `adapters.modules`."""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from lora_cli.formats.factors import PREFIX, AnyFactors, ModuleFactors
from lora_cli.formats.modules import EXPERT_PARAMETERS
from lora_cli.formats.readings import INNER
from lora_cli.formats.skeleton import OWN, WEIGHT, Kind, Skeleton, Spelling
from lora_cli.names import leaf, leaves, parent

Shape = tuple[int, int]

_NONE: Mapping[str, Shape] = {}
_EXPERT = re.compile(r"(.+\.experts)\.\d+\.([^.]+)")


class Place(NamedTuple):
    """The pair of tensors for one matrix, or for a stack of them: `modules` are then its experts, in order.

    `shape` is (out, in) of each matrix, `kernel` that of a convolution. `tensor` is the pair's name up to ".lora_",
    `target` the module or (`by_parameter`) the parameter that the configuration has to name.
    """

    tensor: str
    modules: tuple[str, ...]
    shape: Shape
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

    def spelled(self, spelling: Spelling) -> "Place":
        """The same place in another class of the base."""
        tensor = PREFIX + spelling.of(self.tensor.removeprefix(PREFIX))
        return self._replace(tensor=tensor, target=spelling.of(self.target))


@dataclass(frozen=True)
class Layout:
    """The places of a result's factors; a place whose module is not in the result holds zeros.

    `singles` are the places of single experts' factors, which PEFT fuses: they need one rank, the one that the
    configuration gives as r, and all of a layer have to be there.
    """

    places: tuple[Place, ...]
    singles: frozenset[Place] = frozenset()

    @cached_property
    def of(self) -> Mapping[str, Place]:
        """The place of each module."""
        return {module: place for place in self.places for module in place.modules}

    @property
    def layers(self) -> tuple[str, ...]:
        """The modules that the configuration names, those of single experts excepted."""
        return tuple(place.modules[0] for place in self._named)

    @cached_property
    def _named(self) -> tuple[Place, ...]:
        return tuple(place for place in self.places if not place.by_parameter and place not in self.singles)

    def spelled(self, spelling: Spelling) -> "Layout":
        """The same in another class of the base."""
        if spelling == OWN:
            return self
        places = {place: place.spelled(spelling) for place in self.places}
        return Layout(tuple(places.values()), frozenset(places[place] for place in self.singles))

    def targets(self, meant: Collection[str] | None) -> dict[str, list[str]]:
        """The configuration's target names: `layers` by their last parts if PEFT finds the same modules by these.

        Args:
            meant: every module of the base whose last part is that of one of `layers`; None if the base is not known.
        """
        short = meant == {*self.layers}
        targets = [place.target for place in self._named]
        layers = leaves(targets) if short else set(targets)
        parameters = sorted(place.target for place in self.places if place.by_parameter)
        found = {"target_modules": sorted(layers | leaves(place.target for place in self.singles))}
        return found | ({"target_parameters": parameters} if parameters else {})


def layout(
    modules: Mapping[str, AnyFactors],
    base: Skeleton | None,
    *,
    known: Mapping[str, Shape],
    zeros: Mapping[str, Shape] = _NONE,
) -> Layout:
    """The places of a result's modules.

    Args:
        modules: the result's modules, each with a parent's factors.
        base: the modules of the base, None if they are not known.
        known: shapes (out, in) of all modules that any parent adapts.
        zeros: linear layers, with their shapes (out, in), that must be added as zeros.
    """
    experts = {name: found for name in modules if (found := _expert(name, base)) is not None}
    places = [_alone(name, factors, base) for name, factors in modules.items() if name not in experts]
    places += [_linear(name, shape) for name, shape in zeros.items()]
    if not all(_single(name, modules[name], base) for name in experts):
        stacked = {name: modules[name] for name in experts}
        return Layout((*places, *_stacked(stacked, base)))
    shapes = {name: (modules[name].out_features, modules[name].in_features) for name in experts}
    beside = _beside({container for container, _ in experts.values()}, base, known)
    singles = [_linear(name, shape) for name, shape in (beside | shapes).items()]
    return Layout((*places, *singles), frozenset(singles))


def _expert(name: str, base: Skeleton | None) -> tuple[str, str] | None:
    """(module that holds the stack, last name) of a matrix of one expert; None for any other."""
    if base is None:
        found = _EXPERT.fullmatch(name)
        return None if found is None else (found[1], found[2])
    matrix = base.get(name)
    if matrix is None or matrix.expert is None:
        return None
    return parent(matrix.parameter), leaf(name)


def _single(name: str, factors: AnyFactors, base: Skeleton | None) -> bool:
    """Whether the factors are a single expert's own, under a name by which PEFT fuses them."""
    own = isinstance(factors, ModuleFactors) and factors.experts == 1
    return own and (base is None or leaf(name) in base.retargeted)


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


def _linear(name: str, shape: Shape) -> Place:
    return Place(PREFIX + name, (name,), shape, name)


def _alone(name: str, factors: AnyFactors, base: Skeleton | None) -> Place:
    """The place of a matrix that has a pair of tensors for itself."""
    shape = (factors.out_features, factors.in_features)
    matrix = None if base is None else base.get(name)
    if base is not None and matrix is not None:
        # A target module of a retargeted name would be taken for a part of the experts.
        retargeted = matrix.kind == "linear" and leaf(name) in base.retargeted
        if matrix.kind == "parameter" or retargeted:
            return Place(PREFIX + name, (name,), shape, matrix.parameter, by_parameter=True)
    return Place(PREFIX + name, (name,), shape, name, kind=factors.kind, kernel=factors.kernel)


def _stacked(modules: Mapping[str, AnyFactors], base: Skeleton | None) -> list[Place]:
    """The places of stacks: all of a module as far as they are known, since PEFT and vLLM name them by their nesting.

    The one that is registered first lies innermost.
    """
    stacks: dict[str, dict[str, tuple[int, Shape]]] = {}
    for name, factors in modules.items():
        container, last = _expert(name, base) or ("", "")
        shape = (factors.out_features, factors.in_features)
        stacks.setdefault(container, {})[last] = (factors.parts[0].experts, shape)
    places = []
    for container, found in stacks.items():
        if base is not None:
            found = {last: (stack.experts, stack.shape) for last, stack in base.below[container].items()}
        registered = EXPERT_PARAMETERS if base is None else [*found]
        for depth, last in enumerate(reversed([last for last in registered if last in found])):
            experts, shape = found[last]
            members = tuple(f"{container}.{expert}.{last}" for expert in range(experts))
            tensor = PREFIX + container + INNER * depth
            places.append(Place(tensor, members, shape, f"{container}.{last}", by_parameter=True, kind="parameter"))
    return places
