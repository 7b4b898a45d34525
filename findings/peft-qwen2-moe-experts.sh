#!/usr/bin/env bash
# An adapter on the single experts of a MoE model, as transformers 4 saved it, is applied on Qwen3-MoE and ignored on
# Qwen2-MoE, although PEFT's own table for this conversion is called "qwen2_moe". The table is found by the model's type
# through another one, in which qwen2_moe itself is missing. All that is said: that keys of the shared expert are missing.
# Source: peft/utils/transformers_weight_conversion.py (_MOE_TARGET_MODULE_MAPPING, get_checkpoint_conversion_mapping).
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
LEAVES = {"gate_proj": (24, 32), "up_proj": (24, 32), "down_proj": (32, 24)}
SINGLE = {
    f"model.layers.{layer}.mlp.experts.{expert}.{leaf}": shape
    for layer in range(2) for expert in range(4) for leaf, shape in LEAVES.items()
}


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


targets = {"target_modules": sorted(LEAVES)}
third, _ = effect("Qwen3MoeForCausalLM", transformers.Qwen3MoeConfig(**TEXT, **EXPERTS), factors(SINGLE), **targets)
config = transformers.Qwen2MoeConfig(**TEXT, **EXPERTS, shared_expert_intermediate_size=40)
second, said = effect("Qwen2MoeForCausalLM", config, factors(SINGLE), **targets)
print(f"largest change of a logit: Qwen3-MoE {third:.3f}, Qwen2-MoE {second:.3f}")
assert third > 0.01
assert second == 0
assert not any("unexpected" in one.lower() or "experts.0" in one for one in said)
PYTHON
