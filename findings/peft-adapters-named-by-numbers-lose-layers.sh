#!/usr/bin/env bash
# Adapters called "0", "1" and so on lose layers when they are saved: save_pretrained drops what has the name of another adapter anywhere in
# its key, and ".0." and ".1." are the layers 0 and 1. Of two adapters, each is saved with the layer of its own number alone; of ten, each
# loses nine layers. In memory all of them work, and saving says nothing; who loads such a file is told of missing keys, and goes on.
# Source: peft/utils/save_and_load.py (_filter_state_dict_for_adapter_name).
# peft 0.21.2, transformers 5.24.0, torch 2.13 on a CPU; seen in November 2026.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "torch>=2.13,<2.14" peft==0.21.2 transformers==5.24.0
HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore - <<'PYTHON'
import tempfile
import warnings
from pathlib import Path

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
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


def trial(*names):
    """By name, the layers in the file of an adapter, and the share of its effect that is lost."""
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(base(), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    folder = tempfile.mkdtemp()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(folder)
    found = {}
    for name in names:
        model.set_adapter(name)
        keys = load_file(Path(folder, name, "adapter_model.safetensors"))
        again = PeftModel.from_pretrained(base(), str(Path(folder, name)))
        lost = float((logits(again) - logits(model)).norm() / (logits(model) - logits(base())).norm())
        found[name] = ({key.split(".layers.")[1][0] for key in keys}, lost)
        print(f"of the adapters {names}, {name!r} is saved with the layers {sorted(found[name][0])} and loses {lost:.2f} of its effect")
    return found


print("peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
assert all(layers == {"0", "1"} and lost < 1e-6 for layers, lost in trial("first", "second").values())
assert all(layers == {name} and lost > 0.1 for name, (layers, lost) in trial("0", "1").items())
PYTHON
