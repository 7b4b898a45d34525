"""How programs that load adapters read a merged one, and the requirements of two servers.

The rules are those of vLLM 0.33.0, SGLang 0.5.23, llama.cpp of November 2026 and LoRAX, TensorRT-LLM and lmdeploy 0.18;
docs/merging.md lists them, and tests/readers.py holds each as a function.
"""

import json
import re
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from lora_cli.errors import Refused
from lora_cli.formats.base_names import split_revision
from lora_cli.formats.reader import natural
from lora_cli.names import leaf
from lora_cli.records import Server

TITLES: Mapping[Server, str] = {"vllm": "vLLM 0.33.0", "sglang": "SGLang 0.5.23"}
READ_ONE_RANK = ("llama.cpp", "SGLang", "LoRAX", "TensorRT-LLM", "lmdeploy")
"""The programs that read neither rank_pattern nor alpha_pattern and do not apply every module at its own rank."""
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values of vLLM's `max_lora_rank`."""
# Linear layers of decoder models of the Llama kind, separate and as servers fuse them.
_LLAMA_MODULES = frozenset(
    ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj")
)
# The modules that SGLang fuses into one layer, and those of them that it cannot load without another.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_NEEDS = {"q_proj": "v_proj", "k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
# Modules of one shape in every model whose modules SGLang fuses so.
_ALIKE = {"k_proj": "v_proj", "v_proj": "k_proj", "gate_proj": "up_proj", "up_proj": "gate_proj"}
_LAYER = re.compile(r"((?:.*?\.)?)(\d+)\.(.+)")

Shape = tuple[int, int]


def vllm_rank(rank: int) -> int:
    """The smallest `max_lora_rank` of vLLM that is at least `rank`. Refused above the largest."""
    for accepted in VLLM_RANKS:
        if rank <= accepted:
            return accepted
    raise Refused(
        f"vLLM serves ranks up to {VLLM_RANKS[-1]}, but this result has rank {rank}", hint="give a lower --rank"
    )


def demand_servable(server: Server, *, conv1d: Sequence[str], rank: int) -> None:
    """Refused for modules without a LoRA layer in the server, and for a rank above the server's limit.

    Args:
        conv1d: the adapters whose modules are Conv1D.
    """
    if conv1d:
        raise Refused(f"{TITLES[server]} takes no LoRA on Conv1D modules, as {conv1d[0]} has (fan_in_fan_out)")
    if server == "vllm":
        vllm_rank(rank)


def not_surely_served(modules: Iterable[str]) -> list[str]:
    """The kinds of modules that a server may have no LoRA layer for."""
    return sorted({leaf(module) for module in modules} - _LLAMA_MODULES)


def serve_line(server: Server, base: str, folder: Path, rank: int) -> str:
    """The shell line that serves the adapter on `base`, a Hub id or a folder; quoted, whatever their names hold.

    An id may carry its revision: `owner/name@revision`.
    """
    model, revision = split_revision(base)
    at = ["--revision", revision] if revision else []
    name, path = folder.name, str(folder.absolute())
    adapter = f"{name}={path}"
    # Both split NAME=PATH at an equals sign, vLLM also at commas; JSON avoids the split.
    plain = adapter.count("=") == 1 and "," not in adapter and not name.startswith(("-", "{"))
    if server == "sglang":
        adapter = adapter if plain else json.dumps({"lora_name": name, "lora_path": path})
        launch = ["python", "-m", "sglang.launch_server", "--model-path", model, *at, "--enable-lora"]
        return shlex.join([*launch, "--lora-paths", adapter])
    adapter = adapter if plain else json.dumps({"name": name, "path": path})
    launch = ["vllm", "serve", model, *at, "--enable-lora", "--max-lora-rank", str(vllm_rank(rank))]
    return shlex.join([*launch, "--lora-modules", adapter])


def fused_parts_missing(modules: Collection[str]) -> list[str]:
    """The modules that SGLang fuses with some of `modules` and that `modules` lacks."""
    beside = {
        module.removesuffix(leaf(module)) + part
        for module in modules
        for group in _FUSED
        if leaf(module) in group
        for part in group
    }
    return natural(beside - set(modules))


def sglang_loads(modules: Collection[str]) -> bool:
    """Whether every module that SGLang cannot load alone comes with its required partner."""
    have = set(modules)
    needed = {module.removesuffix(leaf(module)) + _NEEDS[leaf(module)] for module in modules if leaf(module) in _NEEDS}
    return needed <= have


def zeros_for_sglang(modules: Collection[str], shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """The modules that must be added as zeros so that SGLang loads all of `modules`, with their shapes (out, in).

    Args:
        shapes: the shape of every known module.

    Raises:
        Refused: the shape of a module to add is not known.
    """
    by_kind: dict[str, set[Shape]] = {}
    for module, shape in shapes.items():
        by_kind.setdefault(_kind(module), set()).add(shape)
    return {module: _shape_of(module, shapes, by_kind) for module in fused_parts_missing(modules)}


def _shape_of(module: str, shapes: Mapping[str, Shape], by_kind: Mapping[str, Collection[Shape]]) -> Shape:
    last = leaf(module)
    alike = module.removesuffix(last) + _ALIKE.get(last, last)
    if (shape := shapes.get(module) or shapes.get(alike)) is not None:
        return shape
    elsewhere = list(by_kind.get(_kind(module), ()))
    if len(elsewhere) != 1:
        raise Refused(
            f"{TITLES['sglang']} cannot load these modules without {module}, whose shape is not known",
            hint="add an adapter that has this module, or leave out --for",
        )
    return elsewhere[0]


def kinds_in_some_layers(modules: Collection[str], known: Iterable[str], everywhere: Collection[str]) -> list[str]:
    """The last parts of those `modules` that the base has in more layers than `modules`, as far as the base is known.

    Args:
        known: all known modules of the base.
        everywhere: target names of adapters that have all modules of these names; other modules are assumed to be in
            every layer of their stack.
    """
    all_known = _by_kind([*known, *modules])
    layers: dict[str, set[str]] = {}
    for (stack, _), found in all_known.items():
        layers.setdefault(stack, set()).update(found)
    partial = []
    for (stack, kind), found in _by_kind(modules).items():
        complete = any(kind == name or kind.endswith(f".{name}") for name in everywhere)
        if found != (all_known[stack, kind] if complete else layers[stack]):
            partial.append(kind)
    return sorted(set(map(leaf, partial)))


def _by_kind(modules: Iterable[str]) -> dict[tuple[str, str], set[str]]:
    """The layers of each kind of module, (stack, name in the layer): `model.layers.`, `mlp.up_proj`."""
    kinds: dict[tuple[str, str], set[str]] = {}
    for match in filter(None, map(_LAYER.fullmatch, modules)):
        kinds.setdefault((match[1], match[3]), set()).add(match[2])
    return kinds


def _kind(module: str) -> str:
    """A module's name with a star for its layer."""
    return _LAYER.sub(r"\1*.\3", module)
