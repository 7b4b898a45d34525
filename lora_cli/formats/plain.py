"""Decoders of the Llama kind, whose layers are known by their names: to build the class of others takes seconds."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

PLAIN_CLASSES: Final = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Classes of transformers whose linear layers are those of Llama, under the same names."""
_LAYER = r"input_layernorm|post_attention_layernorm|self_attn\.(?:[qkvo]_proj|[qk]_norm)|mlp\.(?:gate|up|down)_proj"
_TENSOR = re.compile(rf"(?:model\.(?:embed_tokens|norm|layers\.\d+\.(?:{_LAYER}))|lm_head)\.(?:weight|bias)")


def has_plain_class(config: Mapping[str, Any]) -> bool:
    """Whether a config.json names one of these classes."""
    named = config.get("architectures")
    return isinstance(named, list) and named[:1] in ([one] for one in PLAIN_CLASSES)


def is_plainly_named(config: Mapping[str, Any], tensors: Iterable[str]) -> bool:
    """Whether the names of a checkpoint's tensors are those of its class, one of these, and no two are one weight.

    Args:
        config: the model's config.json.
    """
    names = {*tensors}
    tied = "lm_head.weight" in names and config.get("tie_word_embeddings", False) is not False
    return has_plain_class(config) and not tied and all(map(_TENSOR.fullmatch, names))
