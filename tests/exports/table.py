"""Kinds of adapters and what each program of `lora export` makes of them: the matrix of docs/exchange.md.

A kind's `write` puts a PEFT folder beside its base and returns the update of each module in float64, by PEFT's formula.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.adapters_on_disk import random_factors, write_adapter

Updates = Mapping[str, Tensor]
Shapes = Mapping[str, tuple[int, int]]

TARGETS = ("gguf", "ollama", "mlx", "openvino", "olive", "vllm", "sglang", "peft")
EXACT, ROUNDED = "exact", "fp32"
"""The same update bit for bit; the scale in B, rounded once to fp32 (relative error below 1e-7)."""

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 104,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
MIXTRAL = LLAMA | {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4}
GPT2 = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 104,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
}
ATTENTION = {"q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (16, 32), "o_proj": (32, 32)}
MLP = {"gate_proj": (48, 32), "up_proj": (48, 32), "down_proj": (32, 48)}
EVERY: Shapes = {
    f"model.layers.{layer}.{block}.{name}": shape
    for layer in range(2)
    for block, names in (("self_attn", ATTENTION), ("mlp", MLP))
    for name, shape in names.items()
}


@dataclass(frozen=True)
class Kind:
    """A kind of adapter. `most` is what every program makes of it, except those in `others`: EXACT, ROUNDED, or the
    words of a refusal.
    """

    title: str
    write: Callable[[Path], Updates]
    most: str = EXACT
    others: Mapping[str, str] = field(default_factory=dict)
    base: Mapping[str, object] = field(default_factory=lambda: LLAMA)

    def outcome(self, target: str) -> str:
        """What a program makes of it."""
        return self.others.get(target, self.most)


def _plain(
    folder: Path,
    shapes: Shapes = EVERY,
    *,
    ranks: Mapping[str, int] | int = 8,
    alphas: Mapping[str, float] | float = 16,
    rslora: bool = False,
    dtype: torch.dtype = torch.float32,
    **config: object,
) -> Updates:
    """Linear layers; ranks and alphas may differ by the last names of modules."""
    rank = {m: ranks if isinstance(ranks, int) else ranks.get(m.rpartition(".")[2], 8) for m in shapes}
    alpha = {m: alphas if isinstance(alphas, int | float) else alphas.get(m.rpartition(".")[2], 16) for m in shapes}
    factors = random_factors(shapes, rank, seed=7, dtype=dtype)
    patterns = {"rank_pattern": {} if isinstance(ranks, int) else dict(ranks)}
    patterns["alpha_pattern"] = {} if isinstance(alphas, int | float) else dict(alphas)
    write_adapter(
        folder,
        factors,
        base=str(folder.parent / "base"),
        r=ranks if isinstance(ranks, int) else 8,
        lora_alpha=alphas if isinstance(alphas, int | float) else 16,
        use_rslora=rslora,
        **patterns,
        **config,
    )
    power = 0.5 if rslora else 1.0
    return {m: alpha[m] / rank[m] ** power * b.double() @ a.double() for m, (b, a) in factors.items()}


def _only(ending: str) -> Shapes:
    return {module: shape for module, shape in EVERY.items() if ending in module}


def _embedding(folder: Path) -> Updates:
    """As PEFT saves it: A (r, vocabulary), B (features, r)."""
    folder.mkdir()
    a, b = (torch.randn(shape, generator=torch.Generator().manual_seed(3)) for shape in ((4, 104), (32, 4)))
    name = "base_model.model.model.embed_tokens.lora_embedding_"
    save_file({f"{name}A": a, f"{name}B": b}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["embed_tokens"]}
    config["base_model_name_or_path"] = str(folder.parent / "base")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return {"model.embed_tokens": 2.0 * b.double() @ a.double()}


def _experts(folder: Path) -> Updates:
    """Single experts, as checkpoints of transformers 4 name them."""
    shapes = {
        f"model.layers.0.block_sparse_moe.experts.{expert}.{name}": shape
        for expert in range(4)
        for name, shape in (("w1", (48, 32)), ("w2", (32, 48)), ("w3", (48, 32)))
    }
    return _plain(folder, shapes)


def _dora(folder: Path) -> Updates:
    return _plain(folder, use_dora=True)


CONV1D = {"transformer.h.0.attn.c_attn": (96, 32), "transformer.h.1.mlp.c_fc": (128, 32)}
_NO_HEAD = "lm_head is outside model.layers"
NO_EMBEDDING = dict.fromkeys(("gguf", "ollama", "mlx", "openvino", "olive"), "embed_tokens is an embedding, which")
_NO_EXPERTS = dict.fromkeys(("gguf", "ollama", "mlx", "openvino", "olive"), "is a part of a layer of experts, which")
_TIED = dict.fromkeys(("gguf", "ollama"), "lm_head has the weight of")
_RANKS = {"q_proj": 4, "down_proj": 2, "o_proj": 12}
_REST = dict.fromkeys(("k_proj", "v_proj", "gate_proj", "up_proj"), 12)
FOLDED = dict.fromkeys(("openvino", "olive"), ROUNDED)

KINDS: tuple[Kind, ...] = (
    Kind("one rank, one alpha", _plain),
    Kind("in bf16", lambda folder: _plain(folder, dtype=torch.bfloat16)),
    Kind("scale no power of two", lambda folder: _plain(folder, alphas=12), others=FOLDED),
    Kind(
        "several ranks of one scale",
        lambda folder: _plain(folder, ranks=_RANKS, alphas={name: 1.5 * rank for name, rank in _RANKS.items()} | _REST),
        others=FOLDED | dict.fromkeys(("gguf", "ollama"), ROUNDED),
    ),
    Kind(
        "rank_pattern and alpha_pattern",
        lambda folder: _plain(folder, ranks=_RANKS, alphas={"q_proj": 6, "o_proj": 20}),
        most=ROUNDED,
    ),
    Kind("rslora", lambda folder: _plain(folder, rslora=True), most=ROUNDED, others={"mlx": EXACT}),
    Kind("one kind of module", lambda folder: _plain(folder, _only("q_proj"))),
    Kind("one layer", lambda folder: _plain(folder, _only("layers.1."))),
    Kind("lm_head", lambda folder: _plain(folder, {**_only("q_proj"), "lm_head": (104, 32)}), others={"mlx": _NO_HEAD}),
    Kind(
        "lm_head tied to the embeddings",
        lambda folder: _plain(folder, {**_only("q_proj"), "lm_head": (104, 32)}),
        others={"mlx": _NO_HEAD, **_TIED},
        base=LLAMA | {"tie_word_embeddings": True},
    ),
    Kind("embeddings", _embedding, others=NO_EMBEDDING),
    Kind("experts, one by one", _experts, others=_NO_EXPERTS, base=MIXTRAL),
    Kind(
        "Conv1D (GPT-2)",
        lambda folder: _plain(folder, CONV1D, fan_in_fan_out=True),
        others={
            "mlx": "is outside model.layers",
            **dict.fromkeys(("vllm", "sglang"), "takes no LoRA on Conv1D modules"),
        },
        base=GPT2,
    ),
    Kind("DoRA", _dora, most="DoRA: weights are rescaled by a trained magnitude"),
)  # fmt: skip


_WHY = {
    "is an embedding": "an embedding",
    "layer of experts": "experts",
    "has the weight of": "a tied weight",
    "is outside model.layers": "outside the layers",
    "Conv1D": "Conv1D",
    "DoRA": "DoRA",
    "is a convolution": "a convolution",
    "depend on the base's config.json": "no names for its base",
    "whose shape is not known": "shapes not known",
}


def rows() -> list[list[str]]:
    """The matrix: a kind and its outcome in each of `TARGETS`, a refusal with its reason in short."""
    return [[kind.title, *(shown(kind.outcome(target)) for target in TARGETS)] for kind in KINDS]


def shown(outcome: str) -> str:
    """A cell of the table."""
    return next((f"refused: {why}" for words, why in _WHY.items() if words in outcome), outcome)
