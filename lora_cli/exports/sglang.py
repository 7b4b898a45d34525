"""SGLang, by the rules of 0.5.23: it reads one rank, and fuses modules into layers that it loads only together."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from lora_cli.errors import Refused
from lora_cli.exports import Server, Shape, named_path
from lora_cli.formats.reader import natural
from lora_cli.names import by_leaf, layer_of, leaf, leaves
from lora_cli.text import in_words

# The modules that it fuses into one layer, and those of them that it cannot load without another.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_NEEDS = {"q_proj": "v_proj", "k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
# Modules of one shape in every model whose modules it fuses so.
_ALIKE = {"k_proj": "v_proj", "v_proj": "k_proj", "gate_proj": "up_proj", "up_proj": "gate_proj"}


class Sglang(Server):
    """The SGLang server."""

    program = "SGLang"
    version = "0.5.23"
    one_rank = True

    def zeros(self, modules: Collection[str], shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        by_kind: dict[str, set[Shape]] = {}
        for module, shape in shapes.items():
            by_kind.setdefault(_kind(module), set()).add(shape)
        return {module: self._shape_of(module, shapes, by_kind) for module in _fused_parts_missing(modules)}

    def _shape_of(self, module: str, shapes: Mapping[str, Shape], by_kind: Mapping[str, Collection[Shape]]) -> Shape:
        last = leaf(module)
        alike = module.removesuffix(last) + _ALIKE.get(last, last)
        if (shape := shapes.get(module) or shapes.get(alike)) is not None:
            return shape
        elsewhere = list(by_kind.get(_kind(module), ()))
        if len(elsewhere) != 1:
            raise Refused(
                f"{self.title} cannot load these modules without {module}, whose shape is not known",
                hint="add an adapter that has this module, or leave out --for",
            )
        return elsewhere[0]

    def misread(self, modules: Collection[str], known: Collection[str]) -> str:
        lost = leaves(module for module in _fused_parts_missing(modules) if module in known)
        if not lost:
            return ""
        alone = "" if _loads(modules) else ", and cannot load them alone"
        return f"SGLang fuses these modules with {in_words(sorted(lost))}{alone}: --for sglang puts zeros there"

    def command(self, base: Sequence[str], folder: Path, rank: int) -> list[str]:
        launch = ["python", "-m", "sglang.launch_server", "--model-path", *base, "--enable-lora"]
        return [*launch, "--lora-paths", named_path(folder, "lora_name", "lora_path")]


def _fused_parts_missing(modules: Collection[str]) -> list[str]:
    """The modules that are fused with some of `modules` and that `modules` lacks."""
    beside = set()
    for last, found in by_leaf(modules).items():
        fused = {part for group in _FUSED if last in group for part in group}
        beside |= {module.removesuffix(last) + part for module in found for part in fused}
    return natural(beside - set(modules))


def _loads(modules: Collection[str]) -> bool:
    """Whether every module that cannot be loaded alone comes with its required partner."""
    have = set(modules)
    lasts = {module: leaf(module) for module in modules}
    needed = {module.removesuffix(last) + _NEEDS[last] for module, last in lasts.items() if last in _NEEDS}
    return needed <= have


def _kind(module: str) -> str:
    """A module's name with a star for its layer."""
    layer = layer_of(module)
    return f"{layer.stack}.*.{layer.place}" if layer else module


sglang = Sglang()
