#!/usr/bin/env bash
# After hotswap_adapter a model works as the new adapter does, but its peft_config is still that of the old one, and save_pretrained writes
# it beside the new factors: an adapter of alpha 32 that was swapped in for one of alpha 4 is loaded again at an eighth of its strength.
# One of half the rank is written padded to the old rank, and loses half of its scale. Nothing is said, and only the saved copy is wrong.
# Source: peft/utils/hotswap.py (hotswap_adapter_from_state_dict sets the scale of the layers, not the configuration).
# peft 0.21.2, transformers 5.24.0, torch 2.13 on a CPU; seen in November 2026.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "torch>=2.13,<2.14" peft==0.21.2 transformers==5.24.0
HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore "$work/venv/bin/python" - <<'PYTHON'
import json
import tempfile
from pathlib import Path

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
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


def saved(seed, **settings):
    """The folder of an adapter."""
    made = get_peft_model(base(), LoraConfig(target_modules=["q_proj", "v_proj"], **settings))
    torch.manual_seed(seed)
    for name, parameter in made.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    folder = tempfile.mkdtemp()
    made.save_pretrained(folder)
    return folder


def loaded(folder):
    return PeftModel.from_pretrained(base(), folder)


def error(found, folder):
    """How far a model is from the adapter in this folder, as a share of the effect of the adapter."""
    expected = logits(loaded(folder))
    return float((logits(found) - expected).norm() / (expected - logits(base())).norm())


print("peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
old = saved(1, r=4, lora_alpha=4)
for rank, alpha in ((4, 4), (4, 32), (2, 4)):
    new = saved(2, r=rank, lora_alpha=alpha)
    model = loaded(old)
    hotswap_adapter(model, new, "default", torch_device="cpu")
    folder = tempfile.mkdtemp()
    model.save_pretrained(folder)
    config = json.loads(Path(folder, "adapter_config.json").read_text())
    swapped, again = error(model, new), error(loaded(folder), new)
    print(f"rank 4, alpha 4 swapped for rank {rank}, alpha {alpha}: in memory wrong by {swapped:.0%};", end=" ")
    print(f"saved with rank {config['r']}, alpha {config['lora_alpha']}, and loaded again wrong by {again:.0%}")
    assert swapped < 1e-5
    assert (config["r"], config["lora_alpha"]) == (4, 4)
    assert again < 1e-5 if (rank, alpha) == (4, 4) else again > 0.4
PYTHON
