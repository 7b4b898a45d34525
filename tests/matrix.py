"""Kinds of adapters that people have, each as a small one on a small base, and what every command makes of it.

`tests/whole/test_matrix.py` runs the commands over this table; `python -m tests.generate` writes docs/adapters.md.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.architectures import factors, model, saved_adapter, trained

TEXT_BASES = frozenset(
    (
        "llama",
        "gpt2",
        "qwen3",
        "falcon",
        "phi3",
        "gemma3",
        "llava",
        "qwen2_5_vl",
        "qwen3_vl_moe",
        "qwen3_moe",
        "qwen2_moe",
        "mixtral",
        "gpt_oss",
    )
)
"""The bases of this table that continue a text: fit and eval take no others."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of adapter.

    `refused` is a part of the reason that every command gives, "" where all take it; `but` names the commands that do
    otherwise, with a part of their reason. `repaired`: PEFT itself does not apply the file as it stands, or not as it
    was trained; the tool's own result it does.
    """

    title: str
    base: str
    make: Callable[[Path, str], object]
    refused: str = ""
    but: Mapping[str, str] = field(default_factory=dict)
    repaired: bool = False
    says: str = ""


def _lora(**settings: Any) -> Callable[[Path, str], object]:
    """As PEFT trains and saves it."""
    return lambda folder, base: trained(folder, base, LoraConfig(**{"r": 2, "lora_alpha": 6} | settings))


def _file(
    shapes: Mapping[str, tuple[int, int]],
    targets: Any,
    *,
    names: Callable[[str], str] = str,
    more: Callable[[], Mapping[str, Tensor]] = dict,
    rank: int = 2,
    **settings: Any,
) -> Callable[[Path, str], object]:
    """As a file of factors for modules of these shapes (out, in), with other names and more tensors."""

    def make(folder: Path, base: str) -> object:
        tensors = {names(name): tensor for name, tensor in factors(shapes, rank=rank).items()}
        return saved_adapter(folder, tensors | dict(more()), targets, **settings)

    return make


def _changed(
    make: Callable[[Path, str], object],
    tensors: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda found: found,
    **settings: Any,
) -> Callable[[Path, str], object]:
    """One of the above with its tensors or its configuration changed."""

    def made(folder: Path, base: str) -> None:
        make(folder, base)
        file = folder / "adapter_model.safetensors"
        changed = tensors(load_file(file))
        save_file({name: tensor.contiguous() for name, tensor in changed.items()}, file, metadata={"format": "pt"})
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | settings))

    return made


def _all(change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda found: {name: change(tensor) for name, tensor in found.items()}


def _singles(leaves: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Factors of the four experts in each of two layers, as transformers 4 names them."""
    return {
        f"model.layers.{layer}.mlp.experts.{expert}.{leaf}": shape
        for layer in range(2)
        for expert in range(4)
        for leaf, shape in leaves.items()
    }


_LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_QWEN = {"gate_proj": (24, 32), "up_proj": (24, 32), "down_proj": (32, 24)}
_Q = {f"model.layers.{layer}.self_attn.q_proj": (32, 32) for layer in range(2)}
_PLAIN = _file(_Q, ["q_proj"])
_FIRST = "base_model.model.model.layers.0.self_attn.q_proj"

KINDS = (
    Kind("linear layers", "llama", _lora(target_modules=_LLAMA)),
    Kind(
        "ranks and alphas of their own (`rank_pattern`, `alpha_pattern`)",
        "llama",
        _lora(target_modules=_LLAMA, rank_pattern={"v_proj": 4}, alpha_pattern={"layers.1.mlp.up_proj": 3}),
    ),
    Kind("`use_rslora`", "llama", _lora(target_modules=_LLAMA, use_rslora=True)),
    Kind("`target_modules` as a regular expression", "llama", _lora(target_modules=r".*\.1\..*\.(q|up)_proj")),
    Kind(
        "some layers (`layers_to_transform`), without some modules (`exclude_modules`)",
        "llama",
        _lora(target_modules=_LLAMA, layers_to_transform=[1], exclude_modules=["o_proj"]),
    ),
    Kind("factors in bf16", "llama", _changed(_PLAIN, _all(lambda tensor: tensor.bfloat16()))),
    Kind("factors in 8-bit floats", "llama", _changed(_PLAIN, _all(lambda tensor: tensor.to(torch.float8_e4m3fn)))),
    Kind("factors in fp16", "llama", _changed(_PLAIN, _all(lambda tensor: tensor.half()))),
    Kind("initialised by `eva`", "llama", _changed(_PLAIN, init_lora_weights="eva")),
    Kind("`Conv1D` layers (`fan_in_fan_out`)", "gpt2", _lora(target_modules=["c_attn", "c_fc", "c_proj"])),
    Kind("fused projections", "phi3", _lora(target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"])),
    Kind("input embeddings", "llama", _lora(target_modules=["embed_tokens", "q_proj"])),
    Kind(
        "output embeddings, with the copy of the base's weight that PEFT saves beside them",
        "llama",
        _changed(
            _lora(target_modules=["lm_head", "q_proj"]),
            lambda found: (
                found | {"base_model.model.lm_head.base_layer.weight": model("llama").lm_head.weight.detach()}
            ),
        ),
        says="the copy is left out, once it was compared with the base",
    ),
    Kind(
        "output embeddings of a base that ties them to the input embeddings",
        "gpt2",
        _lora(target_modules=["lm_head", "c_attn"]),
        but={"bake": "is tied to transformer.wte"},
    ),
    Kind(
        "both embeddings of a base that ties them (`ensure_weight_tying`)",
        "qwen3",
        _lora(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True),
        but={"bake": "is tied to model.embed_tokens"},
        says="written as updates of both",
    ),
    Kind(
        "positions of a base that ties its other embeddings",
        "gpt2",
        _lora(target_modules=["wpe", "c_attn"]),
    ),
    Kind("linear layers of a class of their own", "falcon", _lora(target_modules=["query_key_value", "dense"])),
    Kind(
        "fused experts (`target_parameters`)",
        "qwen3_moe",
        _lora(target_modules=["q_proj"], target_parameters=["gate_up_proj", "down_proj"]),
    ),
    Kind(
        "fused experts with a bias, stored (in, out)",
        "gpt_oss",
        _lora(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
    ),
    Kind(
        "fused experts that the checkpoint stores turned",
        "qwen3_vl_moe",
        _lora(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"]),
    ),
    Kind(
        "routers (`target_parameters`)",
        "qwen3_moe",
        _lora(target_modules=["q_proj"], target_parameters=["gate.weight"]),
    ),
    Kind(
        "ranks and alphas of parameters, by the names of these",
        "qwen3_moe",
        _lora(
            target_modules=["q_proj"],
            target_parameters=["gate.weight", "experts.down_proj", "k_proj.weight"],
            rank_pattern={"gate.weight": 3, "gate": 5, "k_proj": 7},
            alpha_pattern={"k_proj": 40, "k_proj.weight": 9, "experts.down_proj": 3},
        ),
    ),
    Kind(
        "routers that were layers (`target_modules`) and are parameters now",
        "gpt_oss",
        _file({f"model.layers.{layer}.mlp.router": (4, 32) for layer in range(2)}, ["router"]),
        repaired=True,
        says="PEFT refuses it; read as parameters",
    ),
    Kind("single experts, as transformers 4 names them", "qwen3_moe", _file(_singles(_QWEN), [*_QWEN])),
    Kind(
        "single experts of Mixtral",
        "mixtral",
        _file(
            _singles({"w1": (48, 32), "w2": (32, 48), "w3": (48, 32)}),
            ["w1", "w2", "w3"],
            names=lambda name: name.replace("mlp", "block_sparse_moe"),
        ),
    ),
    Kind(
        "single experts of a model whose adapters PEFT does not convert",
        "qwen2_moe",
        _file(_singles(_QWEN), [*_QWEN]),
        repaired=True,
        says="PEFT applies none of it; written as factors of fused experts",
    ),
    Kind(
        "single experts with `use_rslora`",
        "qwen3_moe",
        _file(_singles(_QWEN), [*_QWEN], use_rslora=True),
        repaired=True,
        says="as it was trained: PEFT makes gate and up too strong by √2",
    ),
    Kind(
        "a text model's adapter on its multimodal base",
        "llava",
        _file({"model.layers.1.self_attn.q_proj": (32, 32)}, ["q_proj"]),
        repaired=True,
        says="goes to the language model",
    ),
    Kind(
        "names of transformers 4 on a multimodal base, where PEFT renames them",
        "gemma3",
        _file({"language_model.model.layers.1.self_attn.q_proj": (32, 32)}, ["q_proj"]),
    ),
    Kind(
        "names of transformers 4 on a multimodal base, where PEFT does not",
        "qwen2_5_vl",
        _file({"model.layers.1.self_attn.q_proj": (32, 32)}, ["q_proj"]),
        repaired=True,
        says="PEFT applies none of it",
    ),
    Kind(
        "PEFT's prefix twice",
        "llama",
        _file(_Q, ["q_proj"], names=lambda name: f"base_model.model.{name}"),
        repaired=True,
        says="names repaired",
    ),
    Kind(
        "what `torch.compile`, DDP, FSDP or checkpointing left in names",
        "llama",
        _file(_Q, ["q_proj"], names=lambda name: name.replace("layers.1.", "layers.1._checkpoint_wrapped_module.")),
        repaired=True,
        says="names repaired",
    ),
    Kind(
        "names of the model without a head",
        "llama",
        _file(_Q, ["q_proj"], names=lambda name: name.removeprefix("model.")),
        repaired=True,
        says="names repaired",
    ),
    Kind(
        "factors outside `target_modules` beside others",
        "llama",
        _file(_Q | {"model.layers.0.mlp.up_proj": (48, 32)}, ["q_proj"]),
        says="left out, as PEFT does",
    ),
    Kind("an encoder and decoder", "whisper", _lora(target_modules=["q_proj", "fc1", "lm_head"])),
    Kind("a T5", "t5", _lora(target_modules=["q", "wi"])),
    Kind("an encoder", "roberta", _lora(target_modules=["query", "dense"])),
    Kind(
        "names of transformers 4 on a vision model",
        "vit",
        _file({"vit.encoder.layer.0.attention.attention.query": (32, 32)}, ["query"]),
        repaired=True,
        says="PEFT refuses it; its names are those of an older class",
    ),
    Kind("a vision model, with its convolution", "vit", _lora(target_modules=["q_proj", "projection"])),
    Kind(
        "keys without PEFT's prefix",
        "llama",
        _file(_Q, ["q_proj"], names=lambda name: f"/{name}"),
        refused="PEFT applies none of its modules",
    ),
    Kind(
        "output embeddings with a copy that is not the base's weight",
        "llama",
        _changed(
            _file(_Q | {"lm_head": (104, 32)}, ["q_proj", "lm_head"]),
            lambda found: found | {"base_model.model.lm_head.base_layer.weight": torch.ones(104, 32)},
        ),
        refused="its copy of lm_head.weight differs from",
        but={"sync": ""},
        says="sync, and verify without --deep, do not compare",
    ),
    Kind(
        "embeddings as a parameter (`target_parameters`)",
        "llama",
        _lora(target_modules=["q_proj"], target_parameters=["embed_tokens.weight"]),
        refused="model.embed_tokens is adapted as a parameter",
    ),
    Kind(
        "PyTorch's own attention (`nn.MultiheadAttention`)",
        "siglip",
        _lora(target_modules=["attention"]),
        refused="is in an nn.MultiheadAttention",
    ),
    Kind("`use_dora`", "llama", _lora(target_modules=["q_proj"], use_dora=True), refused="DoRA"),
    Kind("`lora_bias`", "llama", _lora(target_modules=["q_proj"], lora_bias=True), refused="lora_bias"),
    Kind("biases of the base (`bias`)", "gpt2", _lora(target_modules=["c_attn"], bias="lora_only"), refused="bias"),
    Kind(
        "a head or other modules saved whole (`modules_to_save`)",
        "llama",
        _lora(target_modules=["q_proj"], modules_to_save=["lm_head"]),
        refused="tensors of a full head saved",
        but={"diff": ""},
        says="merge takes the update alone by `--saved-modules drop`, and its head from one parent",
    ),
    Kind(
        "single token embeddings (`trainable_token_indices`)",
        "llama",
        _lora(target_modules=["q_proj"], trainable_token_indices=[3, 5]),
        refused="single token embeddings were trained",
    ),
    Kind("aLoRA", "llama", _changed(_PLAIN, alora_invocation_tokens=[3]), refused="aLoRA: the update acts only after"),
    *(
        Kind(
            f"`init_lora_weights` {init}",
            "llama",
            _changed(_PLAIN, init_lora_weights=init),
            refused=f"{name}: B·A is relative to a base that {name} changed",
        )
        for init, name in [
            ("pissa", "PiSSA"),
            ("olora", "OLoRA"),
            ("corda", "CorDA"),
            ("loftq", "LoftQ"),
            ("lora_ga", "LoRA-GA"),
        ]
    ),
    Kind("other methods than LoRA", "llama", _changed(_PLAIN, peft_type="IA3"), refused="an (IA)³ of PEFT"),
    Kind(
        "other ranks in the configuration than in the tensors",
        "llama",
        _changed(_PLAIN, r=8),
        refused="has rank 2 in its tensors and 8 in its configuration",
    ),
    Kind(
        "A and B transposed",
        "llama",
        _changed(_PLAIN, _all(lambda tensor: tensor.T)),
        refused="has rank 32 in",
    ),
    Kind(
        "factors of fused experts without `target_parameters`",
        "qwen3_moe",
        _changed(_lora(target_modules=["q_proj"], target_parameters=["gate_up_proj"]), target_parameters=None),
        refused="factors of fused experts that its target_parameters do not name",
    ),
    Kind(
        "a factor without its partner",
        "llama",
        _changed(_PLAIN, lambda found: {name: one for name, one in found.items() if name != f"{_FIRST}.lora_B.weight"}),
        refused="has lora_A but no lora_B",
    ),
    Kind(
        "several adapters in one file",
        "llama",
        _changed(
            _PLAIN,
            lambda found: {
                name.replace(".weight", f".{which}.weight"): one.clone()
                for name, one in found.items()
                for which in ("a", "b")
            },
        ),
        refused="2 adapters in one file (a, b)",
    ),
    Kind(
        "modules that the base does not have",
        "llama",
        _file({"model.layers.7.self_attn.q_proj": (32, 32)} | _Q, ["q_proj"]),
        refused="not in the base",
    ),
    Kind(
        "shapes that the base does not have",
        "llama",
        _file({"model.layers.0.self_attn.q_proj": (64, 64)}, ["q_proj"]),
        refused="shapes differ from base",
    ),
    Kind(
        "NaN",
        "llama",
        _changed(_PLAIN, _all(lambda tensor: tensor * float("nan"))),
        refused="NaN or Inf",
    ),
)


def mate(folder: Path, base: str) -> None:
    """A plain adapter of the same base, for the commands that take two."""
    torch.manual_seed(7)
    targets = {
        "gpt2": ["c_attn"],
        "falcon": ["query_key_value"],
        "phi3": ["qkv_proj"],
        "t5": ["q"],
        "roberta": ["query"],
    }
    trained(folder, base, LoraConfig(r=2, target_modules=targets.get(base, ["q_proj"])), seed=7)
