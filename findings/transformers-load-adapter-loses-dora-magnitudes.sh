#!/usr/bin/env bash
# model.load_adapter of transformers does not load the magnitudes of a DoRA adapter that PEFT saved: they keep the norms of the base's rows.
# PEFT saves them as "….lora_magnitude_vector"; transformers looks for "….lora_magnitude_vector.default.weight" and finds
# "….lora_magnitude_vector.default". Nothing is raised; a report lists the one as missing and the other as unexpected, which "can be ignored".
# PeftModel.from_pretrained takes the same folder as it was trained.
# Source: PeftAdapterMixin.load_adapter in transformers/integrations/peft.py; peft/utils/save_and_load.py drops the ".weight".
# transformers 5.24.0, peft 0.21.2, torch 2.13 on a CPU; seen in November 2026.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "torch>=2.13,<2.14" peft==0.21.2 transformers==5.24.0
HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore "$work/venv/bin/python" - <<'PYTHON'
import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False,
}
IDS = torch.arange(3, 11)[None]


def base():
    """A small Llama, always the same."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def trial(dora):
    """The share of an adapter's effect that transformers' load_adapter and PEFT lose, and the keys that are said to be missing."""
    trained = get_peft_model(base(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], use_dora=dora))
    for name, parameter in trained.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    folder = tempfile.mkdtemp()
    trained.save_pretrained(folder)
    effect = logits(trained) - logits(base())
    by_transformers = base()
    told = by_transformers.load_adapter(folder)
    by_peft = PeftModel.from_pretrained(base(), folder)
    shares = [float((logits(one) - logits(trained)).norm() / effect.norm()) for one in (by_transformers, by_peft)]
    return *shares, sorted(told.missing_keys)


for dora in (False, True):
    lost, lost_by_peft, missing = trial(dora)
    print(f"use_dora={dora}: transformers loses {lost:.2f} of the effect, PEFT {lost_by_peft:.2f}; missing: {missing[:1]} …")
    assert lost_by_peft < 1e-6
    assert (lost > 0.1) == dora
    assert all(name.endswith("lora_magnitude_vector.default.weight") for name in missing) and len(missing) == 4 * dora
PYTHON
