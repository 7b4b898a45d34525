#!/usr/bin/env bash
# add_weighted_adapter combines the factors A and B and nothing else: a single adapter with weight 1 comes back without its DoRA magnitudes,
# its lora_bias, its trained tokens and its modules_to_save, whose place the base's own take. No error and no warning says so.
# An adapter with a fully trained head thus loses most of what it learnt.
# Source: LoraModel.add_weighted_adapter in peft/tuners/lora/model.py.
# peft 0.21.2, transformers 5.24.0, torch 2.13 on a CPU; seen in November 2026.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "torch>=2.13,<2.14" peft==0.21.2 transformers==5.24.0
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PYTHON'
import warnings

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "attention_bias": True, "tie_word_embeddings": False,
}
TRAINED = ("lora_", "trainable_tokens_delta", "modules_to_save")


def lost(**options):
    """The relative change of an adapter's effect on the logits when it is copied with weight 1, and what PEFT warns of."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"], **options)
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**SHAPE)).eval(), config, adapter_name="one")
    for name, parameter in model.named_parameters():
        if any(part in name for part in TRAINED):
            parameter.data += 0.1 * torch.randn(parameter.shape)
    ids = torch.arange(3, 11)[None]
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with model.disable_adapter():
            base = model(input_ids=ids).logits
        effect = model(input_ids=ids).logits - base
        model.add_weighted_adapter(["one"], [1.0], "again", combination_type="cat")
        model.set_adapter("again")
        copied = model(input_ids=ids).logits - base
    return float((copied - effect).norm() / effect.norm()), [str(one.message) for one in caught]


found = {
    "factors alone": lost(),
    "DoRA": lost(use_dora=True),
    "lora_bias": lost(lora_bias=True),
    "trained tokens": lost(trainable_token_indices=[3, 5, 7]),
    "a head saved whole": lost(modules_to_save=["lm_head"]),
}
for name, (share, said) in found.items():
    print(f"{name}: {share:.2f} of the effect is lost, warnings: {said}")
assert found.pop("factors alone")[0] < 1e-6
assert all(share > 0.2 and not said for share, said in found.values())
PYTHON
