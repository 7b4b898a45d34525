"""Programs that read a merged adapter otherwise than PEFT does.

The rules are those of llama.cpp of November 2026 and of LoRAX, TensorRT-LLM and lmdeploy 0.18, and of every server of
exports/; docs/merging.md lists them.
"""

from collections.abc import Collection, Iterable

from lora_cli.exports import servers
from lora_cli.names import layer_of, leaves
from lora_cli.steps.merge.plan import MergePlan
from lora_cli.steps.merge.scope import targets_everywhere
from lora_cli.text import in_words

ONE_RANK = ("llama.cpp", "LoRAX", "TensorRT-LLM", "lmdeploy")
"""Programs that read neither rank_pattern nor alpha_pattern and do not apply every module at its own rank."""


def notes(plan: MergePlan, ranks: Collection[int]) -> list[str]:
    """Sentences about programs that read the result otherwise than PEFT does.

    Args:
        ranks: the rank of each module of the result.
    """
    if plan.options.dense:
        return []
    found = []
    if plan.options.compact and len(set(ranks)) > 1:
        names = [*ONE_RANK, *(one.program for one in servers() if one.one_rank)]
        found.append(f"ranks differ: {in_words(names)} read this result wrongly or not at all")
    if kinds := _kinds_in_some_layers(plan):
        found.append(
            f"only some layers have {in_words(kinds)}: LoRAX drops these, lmdeploy reads stray memory in the others"
        )
    return [*found, *filter(None, (one.misread(plan.written, plan.known) for one in servers()))]


def _kinds_in_some_layers(plan: MergePlan) -> list[str]:
    """The last parts of modules that the base has in more layers than the result, as far as the base is known.

    A module of a name that an adapter targets everywhere is in the layers where it is known; another module is assumed
    to be in every layer of its stack.
    """
    modules = plan.layout.layers
    known: Collection[str]
    if plan.skeleton is not None:
        known, everywhere = plan.skeleton.matrices, leaves(modules)
    else:
        known, everywhere = plan.known, {name for one in plan.adapters for name in targets_everywhere(one)}
    all_known = _by_kind({*known, *modules})
    layers: dict[str, set[str]] = {}
    for (stack, _), found in all_known.items():
        layers.setdefault(stack, set()).update(found)
    partial = []
    for (stack, kind), found in _by_kind(modules).items():
        complete = any(kind == name or kind.endswith(f".{name}") for name in everywhere)
        if found != (all_known[stack, kind] if complete else layers[stack]):
            partial.append(kind)
    return sorted(leaves(partial))


def _by_kind(modules: Iterable[str]) -> dict[tuple[str, str], set[str]]:
    """The layers of each kind of module, (stack, name in the layer): `model.layers`, `mlp.up_proj`."""
    kinds: dict[tuple[str, str], set[str]] = {}
    for layer in filter(None, map(layer_of, modules)):
        if layer.place:
            kinds.setdefault((layer.stack, layer.place), set()).add(layer.number)
    return kinds
