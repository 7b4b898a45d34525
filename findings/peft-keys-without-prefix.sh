#!/usr/bin/env bash
# Keys without PEFT's prefix "base_model.model." are ignored on a Llama and applied on a Qwen3-MoE: whether the prefix is
# needed hangs on whether transformers 5 has a conversion table for the model's type.
# Source: peft/utils/transformers_weight_conversion.py, _convert_to_peft_serialized_keys, reached only with a table.
# peft 0.21.2, transformers 5.24.0, torch 2.13 on a CPU; seen in November 2026.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "torch>=2.13,<2.14" peft==0.21.2 transformers==5.24.0 safetensors==0.8.0
HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore "$work/venv/bin/python" - <<'PYTHON'
import json
import tempfile
import warnings

import peft
import torch
import transformers
from safetensors.torch import save_file
TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def factors(shapes, prefix="base_model.model."):
    torch.manual_seed(1)
    made = {}
    for name, (rows, columns) in shapes.items():
        made[f"{prefix}{name}.lora_A.weight"] = torch.randn(2, columns)
        made[f"{prefix}{name}.lora_B.weight"] = torch.randn(rows, 2)
    return made


def effect(architecture, config, tensors, **settings):
    """The largest change of a logit by an adapter of these tensors, and what PEFT warns of."""
    torch.manual_seed(0)
    base = getattr(transformers, architecture)(config).eval()
    ids = torch.arange(3, 11)[None]
    folder = tempfile.mkdtemp()
    save_file(tensors, f"{folder}/adapter_model.safetensors")
    with open(f"{folder}/adapter_config.json", "w") as file:
        json.dump({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "base", **settings}, file)
    with torch.no_grad():
        before = base(input_ids=ids).logits
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            adapted = peft.PeftModel.from_pretrained(base, folder)
        return (adapted(input_ids=ids).logits - before).abs().max().item(), [str(one.message) for one in caught]


bare = factors({"model.layers.0.self_attn.q_proj": (128, 32)}, prefix="")
llama = transformers.LlamaConfig(**TEXT, head_dim=32)
moe = transformers.Qwen3MoeConfig(**TEXT, **EXPERTS, head_dim=32)
found = {
    "LlamaForCausalLM": effect("LlamaForCausalLM", llama, bare, target_modules=["q_proj"])[0],
    "Qwen3MoeForCausalLM": effect("Qwen3MoeForCausalLM", moe, bare, target_modules=["q_proj"])[0],
}
print("largest change of a logit:", found)
assert found["LlamaForCausalLM"] == 0
assert found["Qwen3MoeForCausalLM"] > 0.01
PYTHON
