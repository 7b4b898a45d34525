#!/usr/bin/env bash
# Adapters of ViT models made with transformers 4 cannot be loaded under transformers 5: "query", "key" and "value" are
# now q_proj, k_proj and v_proj, encoder.layer is layers. The checkpoint of the base itself still loads, by a renaming that
# PEFT does not apply to target_modules.
# Source: transformers/models/vit/modeling_vit.py and conversion_mapping.py.
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


config = transformers.ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14)
folder = tempfile.mkdtemp()
save_file(factors({"vit.encoder.layer.0.attention.attention.query": (32, 32)}), f"{folder}/adapter_model.safetensors")
with open(f"{folder}/adapter_config.json", "w") as file:
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "base"}
    json.dump({**settings, "target_modules": ["query"]}, file)
model = transformers.ViTForImageClassification(config)
print("modules:", *[name for name, _ in model.named_modules() if name.startswith("vit.layers.0.attention")], sep="\n  ")
try:
    peft.PeftModel.from_pretrained(model, folder)
    said = ""
except ValueError as error:
    said = str(error)
print("PEFT:", said)
assert "Target modules {'query'} not found in the base model" in said
PYTHON
