#!/usr/bin/env bash
# With ensure_weight_tying=True PEFT gives input embeddings and head of a tied base one update. merge_and_unload() adds it
# to the shared weight twice, once for each module, so that the merged model is not the adapted one.
# Source: peft/tuners/lora/model.py (_add_targets_to_tie), peft/tuners/lora/layer.py (Embedding.merge, Linear.merge).
# peft 0.21.2, transformers 5.24.0, torch 2.13 on a CPU; seen in November 2026.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "torch>=2.13,<2.14" peft==0.21.2 transformers==5.24.0
HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore "$work/venv/bin/python" - <<'PYTHON'
import peft
import torch
import transformers

torch.manual_seed(0)
config = transformers.Qwen3Config(
    vocab_size=104, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, tie_word_embeddings=True,
)
base = transformers.Qwen3ForCausalLM(config).eval()
before = base.lm_head.weight.detach().clone()
tied = peft.LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True)
model = peft.get_peft_model(base, tied).eval()
head = model.base_model.model.lm_head
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    update = head.get_delta_weight("default").clone()
    ids = torch.arange(3, 12)[None]
    adapted = model(input_ids=ids).logits
    merged = model.merge_and_unload()
    difference = (merged(input_ids=ids).logits - adapted).abs().max().item()
    added = merged.lm_head.weight - before
times = ((added * update).sum() / (update * update).sum()).item()
print(f"the update was added {times:.3f} times; logits of the merged model differ by {difference:.3f}")
assert abs(times - 2) < 1e-3
PYTHON
