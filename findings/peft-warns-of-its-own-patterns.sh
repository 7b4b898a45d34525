#!/usr/bin/env bash
# PEFT adds a rank_pattern and an alpha_pattern for fused experts by itself, uses them, and then warns the user that these
# keys "did not match any targeted module and were ignored". They were not: the rank of gate_up_proj is doubled by them.
# Source: peft/utils/transformers_weight_conversion.py (where they are added), peft/tuners/tuners_utils.py (the warning).
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

base = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**TEXT, **EXPERTS))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["gate_proj", "up_proj", "down_proj"]))
said = [str(one.message) for one in caught if "rank_pattern" in str(one.message)]
experts = model.base_model.model.model.layers[0].mlp.experts
ranks = {"gate_up_proj": experts.base_layer.r["default"], "down_proj": experts.r["default"]}
print("warned:", *said, sep="\n  ")
print("ranks:", ranks)
assert len(said) == 1
assert "did not match any targeted module and were ignored" in said[0]
assert ranks == {"gate_up_proj": 4, "down_proj": 2}
PYTHON
