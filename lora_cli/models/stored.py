"""The places of a class's parameters in a checkpoint, by the conversions that transformers applies on loading."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lora_cli.formats.skeleton import Share, Stored

Shapes = Mapping[str, tuple[int, ...]]


def stored(model: Any, tensors: Shapes) -> Stored:
    """The shares of every parameter of `model` that a checkpoint with these tensors holds.

    A parameter that is stored in another arrangement than whole rows is in `others`, with the arrangement's name.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model, add_legacy=False)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    found = Stored({}, {})
    groups: dict[tuple[str, int], dict[str, list[str]]] = {}
    for tensor in sorted(tensors, key=dot_natural_key):
        name, pattern = rename_source_key(tensor, renamings, converters, model.base_model_prefix, shapes)
        if pattern is None:
            found.shares.setdefault(name, []).append(Share(tensor))
        else:
            place = converters.index(by_pattern[pattern])
            groups.setdefault((name, place), {}).setdefault(pattern, []).append(tensor)
    for (name, place), by_source in groups.items():
        _convert(found, converters[place], name, by_source, tensors, shapes)
    return found


def _convert(
    found: Stored, converter: Any, name: str, by_source: Mapping[str, Sequence[str]], tensors: Shapes, shapes: Shapes
) -> None:
    """The shares of the result of one conversion of the tensors that match its patterns."""
    operations = [type(one).__name__ for one in converter.operations]
    dims = [getattr(one, "dim", None) for one in converter.operations]
    sources = [by_source[pattern] for pattern in converter.source_patterns if pattern in by_source]
    targets = [name.replace(converter.target_patterns[0], target) for target in converter.target_patterns]
    if operations in (["MergeModulelist"], ["MergeModulelist", "Concatenate"]) and dims in ([0], [0, 1]):
        shares = list(_of_experts(sources, tensors))
    elif operations == ["Concatenate"] and dims == [0] and all(len(source) == 1 for source in sources):
        shares = list(_side_by_side([tensor for [tensor] in sources], tensors))
    elif operations == ["Transpose"] and [len(source) for source in sources] == [1] and name in shapes:
        # A tensor that already has the class's shape is not converted.
        shares = [Share(sources[0][0], turned=tensors[sources[0][0]] != shapes[name])]
    elif operations in (["Chunk"], ["Split"]) and dims == [0] and all(target in shapes for target in targets):
        heights = [shapes[target][0] for target in targets]
        starts = [0, *itertools.accumulate(heights)]
        for target, start, height in zip(targets, starts, heights, strict=False):
            found.shares.setdefault(target, []).append(Share(sources[0][0], rows=height, at=start))
        return
    else:
        found.others.update((target, " and ".join(operations)) for target in targets)
        return
    found.shares.setdefault(name, []).extend(shares)


def _of_experts(sources: Sequence[Sequence[str]], tensors: Shapes) -> Iterator[Share]:
    """One tensor per expert and part, in the natural order of their names."""
    row = 0
    for source in sources:
        for expert, tensor in enumerate(source):
            yield Share(tensor, expert=expert, row=row, rows=tensors[tensor][0])
        row += tensors[source[0]][0]


def _side_by_side(names: Sequence[str], tensors: Shapes) -> Iterator[Share]:
    row = 0
    for tensor in names:
        yield Share(tensor, row=row, rows=tensors[tensor][0])
        row += tensors[tensor][0]
