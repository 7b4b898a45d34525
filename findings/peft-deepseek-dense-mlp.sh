#!/usr/bin/env bash
# On DeepSeek-V3, target_modules ["gate_proj", "up_proj", "down_proj"] adapts the routed experts alone. The MLP of the dense
# layers and the shared expert are plain nn.Linear under exactly these names and get no LoRA; nothing says so.
# PEFT takes the names out of target_modules for every model whose experts transformers 5 fuses.
# Source: peft/utils/transformers_weight_conversion.py, _convert_peft_config_moe. The way out: target_parameters,
# such as "model.layers.0.mlp.gate_proj.weight".
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


def adapted(architecture, config, **settings):
    """The modules that a new LoRA adapts, and what PEFT warns of."""
    base = getattr(transformers, architecture)(config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.get_peft_model(base, peft.LoraConfig(r=2, **settings))
    names = {name.split(".lora_A")[0].removeprefix("base_model.model.") for name, _ in model.named_parameters() if "lora_A" in name}
    return sorted(names), [str(one.message) for one in caught]


config = transformers.DeepseekV3Config(
    vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
    q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, first_k_dense_replace=1,
    n_shared_experts=1,
)
model = transformers.DeepseekV3ForCausalLM(config)
named = ("gate_proj", "up_proj", "down_proj")
linear = [name for name, one in model.named_modules() if isinstance(one, torch.nn.Linear) and name.endswith(named)]
got, _ = adapted("DeepseekV3ForCausalLM", config, target_modules=[*named])
print("linear layers of these names:", *linear, sep="\n  ")
print("adapted:", *got, sep="\n  ")
assert len(linear) == 6
assert got == ["model.layers.1.mlp.experts", "model.layers.1.mlp.experts.base_layer"]
PYTHON
