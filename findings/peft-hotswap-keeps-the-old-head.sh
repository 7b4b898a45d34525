#!/usr/bin/env bash
# hotswap_adapter leaves the head of the old adapter in the model: modules_to_save of the old adapter that the new one lacks stay as they were
# trained, while LoRA factors that it lacks are set to 0. So a plain adapter swapped in for one with a trained lm_head runs with the head
# of the other, which set_adapter and a fresh load do not do. No error and no warning says so.
# Source: peft/utils/hotswap.py (hotswap_adapter_from_state_dict looks for "lora_" in names; CONFIG_KEYS_TO_CHECK has no modules_to_save).
# peft 0.21.2, transformers 5.24.0, torch 2.13 on a CPU; seen in November 2026.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "torch>=2.13,<2.14" peft==0.21.2 transformers==5.24.0
HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore::FutureWarning - <<'PYTHON'
import tempfile

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
    made = get_peft_model(base(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **settings))
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
plain = saved(2)
for name, settings in (("another plain one", {}), ("one with a trained lm_head", {"modules_to_save": ["lm_head"]})):
    old = saved(1, **settings)
    swapped = loaded(old)
    hotswap_adapter(swapped, plain, "default", torch_device="cpu")
    switched = loaded(old)
    switched.load_adapter(plain, "plain")
    switched.set_adapter("plain")
    wrong, right = error(swapped, plain), error(switched, plain)
    print(f"a plain adapter after {name}: swapped in it is wrong by {wrong:.0%} of its effect, by set_adapter by {right:.0%}")
    assert right < 1e-5
    assert (wrong > 0.5) == bool(settings)
PYTHON
