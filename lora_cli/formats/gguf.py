"""Adapters in GGUF, as llama.cpp reads them: architectures, names of tensors, the order of rows, the gguf package.

llama.cpp multiplies B·A by alpha over the rank of the module's own tensors. For most models with rotary embeddings its
converter arranges the rows of q and k anew: of each head, row i of the first half comes before row i of the second.
Source: llama.cpp, `convert_lora_to_gguf.py` and `src/llama-adapter.cpp` of November 2026; the converter was run for
every architecture here.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from lora_cli.errors import Refused, UsageError
from lora_cli.formats.plain import has_plain_class
from lora_cli.names import layer_of, leaf
from lora_cli.text import shortened

if TYPE_CHECKING:
    from lora_cli.formats.reader import OpenAdapter


class Architecture(NamedTuple):
    """A model of llama.cpp: its name in GGUF, and whether the rows of q and k are rearranged."""

    name: str
    rearranged: bool = False


ARCHITECTURES: Final[Mapping[str, Architecture]] = {
    "ApertusForCausalLM": Architecture("apertus"),
    "ArceeForCausalLM": Architecture("arcee", rearranged=True),
    "Cohere2ForCausalLM": Architecture("cohere2"),
    "CohereForCausalLM": Architecture("command-r"),
    "Ernie4_5ForCausalLM": Architecture("ernie4_5"),
    "Exaone4ForCausalLM": Architecture("exaone4"),
    "Gemma2ForCausalLM": Architecture("gemma2"),
    "Gemma3ForCausalLM": Architecture("gemma3"),
    "GemmaForCausalLM": Architecture("gemma"),
    "Glm4ForCausalLM": Architecture("glm4"),
    "GlmForCausalLM": Architecture("chatglm"),
    "GPT2LMHeadModel": Architecture("gpt2"),
    "GPTBigCodeForCausalLM": Architecture("starcoder"),
    "GraniteForCausalLM": Architecture("granite", rearranged=True),
    "GraniteMoeForCausalLM": Architecture("granitemoe", rearranged=True),
    "HunYuanDenseV1ForCausalLM": Architecture("hunyuan-dense"),
    "Lfm2ForCausalLM": Architecture("lfm2"),
    "LlamaForCausalLM": Architecture("llama", rearranged=True),
    "MistralForCausalLM": Architecture("llama", rearranged=True),
    "MixtralForCausalLM": Architecture("llama", rearranged=True),
    "NemotronForCausalLM": Architecture("nemotron"),
    "Olmo2ForCausalLM": Architecture("olmo2"),
    "Olmo3ForCausalLM": Architecture("olmo2"),
    "OlmoForCausalLM": Architecture("olmo", rearranged=True),
    "Phi3ForCausalLM": Architecture("phi3"),
    "PhiForCausalLM": Architecture("phi2"),
    "Qwen2ForCausalLM": Architecture("qwen2"),
    "Qwen2MoeForCausalLM": Architecture("qwen2moe"),
    "Qwen3ForCausalLM": Architecture("qwen3"),
    "Qwen3MoeForCausalLM": Architecture("qwen3moe"),
    "SeedOssForCausalLM": Architecture("seed_oss"),
    "SmolLM3ForCausalLM": Architecture("smollm3", rearranged=True),
    "StableLmForCausalLM": Architecture("stablelm"),
    "Starcoder2ForCausalLM": Architecture("starcoder2"),
}
"""The classes of transformers whose linear layers llama.cpp keeps as they are, but for the order of rows."""


@dataclass(frozen=True)
class Base:
    """The facts of a base's config.json that decide an adapter in GGUF. `heads`, `pairs`: its heads of q and of k."""

    architecture: Architecture
    layers: int
    heads: int
    pairs: int

    def parts(self, module: str) -> int:
        """The heads whose rows of B are rearranged in a module, 0 where rows stay as they are."""
        if not self.architecture.rearranged:
            return 0
        return {"q_proj": self.heads, "k_proj": self.pairs}.get(leaf(module), 0)

    def names(self) -> "Names":
        """The names of its tensors. UsageError where the gguf package is not installed."""
        gguf = package()
        kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
        return Names(gguf.get_tensor_name_map(kinds[self.architecture.name], self.layers))


class Names:
    """The tensors' names in GGUF for modules of the base."""

    def __init__(self, table: Any) -> None:
        self._table = table

    def of(self, module: str) -> str | None:
        """The name of a module's weight in GGUF, None for a module that llama.cpp has no name for."""
        name: str | None = self._table.get_name(f"{module}.weight", try_suffixes=(".weight",))
        return name


def is_plain(adapter: "OpenAdapter", config: Mapping[str, Any]) -> bool:
    """Whether the modules are linear layers of a Llama or one of its kin, under their names and of their shapes.

    Args:
        adapter: opened without a base, by the names in its file.
        config: the base's config.json.
    """
    if not has_plain_class(config):
        return False
    if adapter.notes or adapter.copies or adapter.saved or adapter.fan_in_fan_out:
        return False
    try:
        base = base_of(config, "")
        hidden, inner = (_count(config, (key,), "") for key in ("hidden_size", "intermediate_size"))
        head = _count(config, ("head_dim",), "") if config.get("head_dim") is not None else hidden // base.heads
    except Refused:
        return False
    q, k = (base.heads * head, hidden), (base.pairs * head, hidden)
    attention = {"q_proj": q, "k_proj": k, "v_proj": k, "o_proj": q[::-1]}
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    shapes = {f"self_attn.{name}": shape for name, shape in attention.items()}
    shapes |= {f"mlp.{name}": shape for name, shape in mlp.items()}
    for module, factors in adapter.modules.items():
        layer = layer_of(module)
        if layer is None or layer.stack != "model.layers" or not int(layer.number) < base.layers:
            return False
        if factors.kind != "linear" or factors.kernel or shapes.get(layer.place) != adapter.shape(module):
            return False
    return True


def package() -> ModuleType:
    """The gguf package. UsageError, with the extra to install, if there is none."""
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise UsageError("GGUF needs the gguf package", hint="pip install 'lora-cli[gguf]'") from error


def base_of(config: Mapping[str, Any], name: str, *, of_class: str = "") -> Base:
    """What a base's config.json says. Refused for a class that is not in `ARCHITECTURES`, or a number that is missing.

    Args:
        name: the base's name in messages.
        of_class: the base's class in transformers, "" for the first that the configuration names.
    """
    named = config.get("architectures")
    found = (
        of_class or next((one for one in named if isinstance(one, str)), "") if isinstance(named, list) else of_class
    )
    architecture = ARCHITECTURES.get(found)
    if architecture is None:
        raise Refused(
            f"{name} is a {shortened(found) or 'model of no class'}, whose layers in llama.cpp are not known here",
            hint="docs/exporting.md lists the classes; lora bake adds the adapter to the base instead",
        )
    keys = {"layers": ("num_hidden_layers", "n_layer"), "heads": ("num_attention_heads", "n_head")}
    layers, heads = (_count(config, keys[what], name) for what in ("layers", "heads"))
    pairs = _count(config, ("num_key_value_heads",), name) if config.get("num_key_value_heads") is not None else heads
    return Base(architecture, layers, heads, pairs)


def _count(config: Mapping[str, Any], keys: tuple[str, ...], name: str) -> int:
    found = next((config[key] for key in keys if key in config), None)
    if not isinstance(found, int) or isinstance(found, bool) or not 0 < found < 1_000_000:
        raise Refused(f"{name}: {keys[0]} in its config.json is {shortened(found)}, not a number of them")
    return found
