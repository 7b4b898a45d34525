#!/usr/bin/env bash
# An adapter with use_rslora on single experts, saved with transformers 4, acts on gate and up too strongly by the square
# root of 2 under transformers 5. PEFT fuses gate and up into one update of twice the rank and doubles alpha, which keeps
# alpha/r; rslora divides by the square root of r.
# Source: peft/utils/transformers_weight_conversion.py, _convert_peft_config_moe.
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


def update(rslora):
    """What PEFT adds to the gate and up projections of expert 0 in layer 0, over B·A."""
    torch.manual_seed(0)
    base = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**TEXT, **EXPERTS))
    name = "model.layers.0.mlp.experts"
    before = base.get_parameter(f"{name}.gate_up_proj")[0].detach().clone()
    torch.manual_seed(1)
    tensors = {}
    for module, (rows, columns) in SINGLE.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(4, columns)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, 4)
    folder = tempfile.mkdtemp()
    save_file(tensors, f"{folder}/adapter_model.safetensors")
    with open(f"{folder}/adapter_config.json", "w") as file:
        settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "base"}
        json.dump({**settings, "target_modules": sorted(LEAVES), "use_rslora": rslora}, file)
    merged = peft.PeftModel.from_pretrained(base, folder).merge_and_unload()
    found = merged.get_parameter(f"{name}.gate_up_proj")[0].detach() - before
    a, b = (tensors[f"base_model.model.{name}.0.gate_proj.lora_{side}.weight"] for side in "AB")
    return (found[:24].norm() / (b @ a).norm()).item()


plain, rslora = update(False), update(True)
print(f"scale of the update: {plain:.4f} (alpha/r is 2), with use_rslora {rslora:.4f} (alpha/sqrt(r) is 4)")
assert abs(plain - 2) < 1e-4
assert abs(rslora - 4 * 2**0.5) < 1e-4
PYTHON
