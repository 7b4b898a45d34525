#!/usr/bin/env bash
# layers_to_transform and exclude_modules hold for target_modules and not for target_parameters: of one LoraConfig with
# layers_to_transform=[0] the attention is adapted in layer 0 alone, the fused experts in every layer.
# Source: peft/tuners/tuners_utils.py, inject_adapter and _inject_parameters.
# peft 0.21.2, transformers 5.24.0, torch 2.13 on a CPU; seen in November 2026.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "torch>=2.13,<2.14" peft==0.21.2 transformers==5.24.0
HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore "$work/venv/bin/python" - <<'PYTHON'
import warnings

import peft
import torch
import transformers
TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def adapted(architecture, config, **settings):
    """The modules that a new LoRA adapts, and what PEFT warns of."""
    base = getattr(transformers, architecture)(config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.get_peft_model(base, peft.LoraConfig(r=2, **settings))
    names = {name.split(".lora_A")[0].removeprefix("base_model.model.") for name, _ in model.named_parameters() if "lora_A" in name}
    return sorted(names), [str(one.message) for one in caught]


config = transformers.Qwen3MoeConfig(**TEXT, **EXPERTS)
both = {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}
first, said = adapted("Qwen3MoeForCausalLM", config, **both, layers_to_transform=[0])
print("layers_to_transform=[0]:", *first, sep="\n  ")
assert first == ["model.layers.0.mlp.experts", "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.experts"]
without, _ = adapted("Qwen3MoeForCausalLM", config, **both, exclude_modules=["experts"])
print('exclude_modules=["experts"]:', *without, sep="\n  ")
assert "model.layers.1.mlp.experts" in without
PYTHON
