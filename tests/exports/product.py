"""What each program of `lora export` makes of every adapter that `lora convert` takes: the product in docs/exchange.md.

A cell is EXACT where both steps keep the numbers, ROUNDED where one of them computes factors in fp32, or the words of a
refusal.
"""

from collections.abc import Mapping

from tests.exports.table import EXACT, FOLDED, NO_EMBEDDING, ROUNDED, TARGETS, shown
from tests.imports.kinds import SAMPLES, Sample

TAKEN = [one for one in SAMPLES if not one.refused]
DECODER = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
"""The base of the samples whose modules are those of a decoder."""

_NO_NAMES = dict.fromkeys(("gguf", "ollama"), "the names of layers depend on the base's config.json")
_OUTSIDE = {**_NO_NAMES, "mlx": "is outside model.layers"}
_PICTURES = {**_NO_NAMES, **dict.fromkeys(("mlx", "openvino", "olive"), "is a convolution, which")}
_DIFFUSERS = {**_PICTURES, "sglang": "whose shape is not known"}

_OTHERS: Mapping[str, Mapping[str, str]] = {
    "mlx-lm": FOLDED,
    "mlx-lm, a checkpoint file": FOLDED,
    "mlx-lm, the embedding": NO_EMBEDDING,
    "kohya": _PICTURES,
    "kohya, several alphas": _PICTURES,
    "kohya, alphas as integers": _PICTURES,
    "kohya, no alpha": _PICTURES,
    "diffusers": _DIFFUSERS,
    "diffusers with its configurations": _DIFFUSERS,
    "diffusers before 0.22": _DIFFUSERS,
    "diffusers, its training scripts": _DIFFUSERS,
    "diffusers, attention processors": {**_OUTSIDE, "sglang": "whose shape is not known"},
    "AdapterHub": _OUTSIDE,
}
"""The cells that are not what the conversion alone makes of a sample."""


def outcome(sample: Sample, target: str) -> str:
    """What a program makes of a converted sample."""
    return _OTHERS.get(sample.title, {}).get(target, EXACT if sample.exact else ROUNDED)


def rows() -> list[list[str]]:
    """The table: a sample and its outcome in each of `TARGETS`, a refusal with its reason in short."""
    return [[one.title, *(shown(outcome(one, target)) for target in TARGETS)] for one in TAKEN]
