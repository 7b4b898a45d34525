#!/usr/bin/env bash
# PEFT takes Whisper's conv1 as a target, makes a LoRA layer around it, and then the encoder's forward fails: it asks its
# first convolutions for their stride, which the LoRA layer does not pass on. Merged into the weights the adapter works.
# Source: transformers/models/whisper/modeling_whisper.py (the check of the input's length), peft/tuners/lora/layer.py.
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

config = transformers.WhisperConfig(
    vocab_size=104, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=20, max_target_positions=20, num_mel_bins=8,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
)
model = peft.get_peft_model(
    transformers.WhisperForConditionalGeneration(config), peft.LoraConfig(r=2, target_modules=["conv1"])
)
inputs = {"input_features": torch.randn(1, 8, 40), "decoder_input_ids": torch.arange(3, 7)[None]}
try:
    model(**inputs)
    said = ""
except AttributeError as error:
    said = str(error)
print("adapted, the forward says:", said)
merged = model.merge_and_unload()
print("merged, it gives logits of shape", tuple(merged(**inputs).logits.shape))
assert "has no attribute 'stride'" in said
PYTHON
