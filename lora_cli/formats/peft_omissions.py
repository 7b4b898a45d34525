"""The modules of an adapter that PEFT itself leaves out, or applies otherwise than they were trained."""

from collections.abc import Mapping

from lora_cli.formats.factors import AnyFactors
from lora_cli.formats.facts import LoraConfigFacts
from lora_cli.formats.skeleton import Skeleton
from lora_cli.names import by_leaf, leaf, leaves, parent
from lora_cli.text import shortened


def left_out_by_peft(base: Skeleton, config: LoraConfigFacts, modules: Mapping[str, AnyFactors]) -> list[str]:
    """Where PEFT does not apply factors of single experts, or of modules it takes for such, as they were trained."""
    singles = {name: matrix for name, matrix in base.experts(modules).items() if modules[name].parts[0].experts == 1}
    last = leaves(singles)
    notes = []
    if last - base.retargeted:
        notes.append(f"PEFT does not apply factors of single experts on a {base.architecture}")
    elif singles:
        fused = leaves(matrix.parameter for matrix in singles.values())
        if config.rslora and any(matrix.shape != base.stacks[matrix.parameter].shape for matrix in singles.values()):
            notes.append("use_rslora: PEFT makes the update of fused experts too strong by the square root of 2")
        if "down_proj" not in fused and not config.targets.module(f"{parent(min(singles))}.down_proj"):
            notes.append("PEFT does not apply the experts' factors without those of down_proj")
    if bare := [name for name, factors in modules.items() if _is_no_layer(base, name, factors)]:
        notes.append(f"PEFT does not take {shortened(bare[0])} for a layer: read as a parameter")
    named = [name for last, found in by_leaf(modules).items() if last in base.retargeted for name in found]
    taken = [name for name in named if name not in singles and modules[name].kind == "linear"]
    by_weight = config.targets.by_weight(taken)
    if taken := [name for name in taken if name not in by_weight]:
        notes.append(f"PEFT takes {shortened(taken[0])} for a part of the experts and does not apply it")
    return notes


def _is_no_layer(base: Skeleton, name: str, factors: AnyFactors) -> bool:
    """Whether the configuration names a parameter of the base as a layer."""
    bare = factors.kind == "parameter" and name in base.matrices and factors.parts[0].pattern == name
    return bare and leaf(name) not in base.retargeted
