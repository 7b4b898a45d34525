"""The modules of a merge: those in --scope, and those that their names mean in the base."""

import fnmatch
from collections.abc import Collection, Sequence, Set
from itertools import pairwise

from lora_cli.errors import NothingMatched, Refused, UsageError
from lora_cli.formats.reader import OpenAdapter, all_modules, shapes_of
from lora_cli.formats.skeleton import Skeleton
from lora_cli.names import by_leaf, layer_of, leaf, leaves


def modules_in_scope(adapters: Sequence[OpenAdapter], scope: Sequence[str]) -> tuple[str, ...]:
    """The modules of the adapters that are in the scope.

    Raises:
        NothingMatched: no module is in the scope.
        Refused: an adapter is given twice, or has no module in the scope.
    """
    for one, other in pairwise(adapters):
        if one.ref.commit == other.ref.commit and one.ref.id == other.ref.id:
            raise Refused(f"{one.ref.id} is given twice", hint="give it once, with the sum of the weights")
    modules = tuple(module for module in all_modules(adapters) if _in_scope(module, scope))
    if not modules:
        raise NothingMatched(f"none of the adapters' modules is in the scope {' '.join(scope)}")
    if outside := [adapter.ref.id for adapter in adapters if adapter.modules.keys().isdisjoint(modules)]:
        raise Refused(f"{', '.join(outside)}: no module in the scope {' '.join(scope)}", hint="leave it out")
    return modules


def _in_scope(module: str, scope: Sequence[str]) -> bool:
    return all(_holds(module, condition) for condition in scope)


def _holds(module: str, condition: str) -> bool:
    what, equals, listed = condition.partition("=")
    parts = [part.strip() for part in listed.split(",")]
    if not equals or what not in ("layers", "modules") or not all(parts):
        raise UsageError(f"--scope is layers=0-15,20 or modules=q_proj,*.mlp.*, not {condition!r}")
    if what == "modules":
        return any(fnmatch.fnmatchcase(name, part) for name in (module, leaf(module)) for part in parts)
    ranges = [_layers(part, condition) for part in parts]
    layer = layer_of(module)
    return layer is not None and any(low <= int(layer.number) <= high for low, high in ranges)


def _layers(part: str, condition: str) -> tuple[int, int]:
    low, dash, high = part.partition("-")
    if not is_number(low) or (dash and not is_number(high)) or (dash and int(high) < int(low)):
        raise UsageError(f"--scope {condition}: {part!r} is neither a layer nor a range of layers such as 0-15")
    return int(low), int(high) if dash else int(low)


def is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 10


def modules_meant(
    modules: Collection[str], adapters: Sequence[OpenAdapter], base: Skeleton | None = None
) -> set[str] | None:
    """Every module of the base whose last part is that of one of `modules`; None if the base is not known well enough.

    An adapter whose configuration names targets by their last parts, and no layers, has all modules of these names.
    """
    names = leaves(modules)
    if base is not None and names & base.others:
        return None
    known = {name: {*found} for name, found in by_leaf(shapes_of(adapters) if base is None else base.matrices).items()}
    if base is None and not all(_all_there(name, known.get(name, set()), adapters) for name in names):
        return None
    return {module for name in names for module in known.get(name, ())}


def _all_there(name: str, known: Set[str], adapters: Sequence[OpenAdapter]) -> bool:
    """Whether the base has no other modules called `name` than `known`, by the adapters that have all of this name."""
    having_all = [adapter for adapter in adapters if name in targets_everywhere(adapter)]
    return bool(having_all) and all(known <= adapter.modules.keys() for adapter in having_all)


def targets_everywhere(adapter: OpenAdapter) -> tuple[str, ...]:
    """The target names of an adapter that apply to every layer of the base."""
    config = adapter.config
    if isinstance(config.target_modules, str) or config.layers_to_transform or config.exclude_modules:
        return ()
    return config.target_modules
